"""`steer compare`, `score` and `patch` against a real server: what they print is what the client gets."""

import asyncio
import json
import re
import shlex

import pytest
from steer.v1 import steering_pb2

from steer_client import SteerClient, ablate, add, clamp, scale, tables
from steer_client.arguments import STRENGTHS, written
from steer_client.cli import _EXAMPLES, parser
from steer_client.experiments import _COMPARE, _PATCH, _SCORE
from steer_server.generation import SlotLoad
from tests.unit.serving import NAME, Serving, serving
from tests.unit.test_client import steer

STEERED, ABLATED = add((NAME, 3), 1, "norm"), ablate((NAME, 3))


@pytest.fixture(scope="module")
async def running():
    async with serving() as service:
        yield service


@pytest.fixture
async def client(running: Serving):
    async with SteerClient(running.target, timeout=10) as connected:
        yield connected


async def printed(service: Serving, *arguments: str) -> tuple[list[str], str]:
    """The lines on stdout of a command that succeeds, and all of stderr."""
    code, out, err = await steer(*arguments, "--server", service.target)
    assert code == 0, err
    return out.splitlines(), err


@pytest.mark.parametrize("help_text", [_EXAMPLES, _COMPARE, _SCORE, _PATCH])
def test_every_example_of_the_help_is_a_command(help_text: str):
    commands = [line for line in help_text.splitlines() if line.startswith("  steer ")]

    for command in commands:
        assert parser().parse_args(shlex.split(command)[1:])
    assert commands


@pytest.mark.parametrize("name", ["compare", "score", "patch"])
def test_the_help_of_a_command_has_its_examples(name: str, capsys):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args([name, "--help"])

    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"examples:\n  steer {name} " in shown
    assert (STRENGTHS in shown) == (name != "patch")


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (ABLATED, "ablate small:3"),
        (STEERED, "add small:3=1norm"),
        (clamp((NAME, 3), 2.5, "max"), "clamp small:3=2.5xmax"),
        (add((NAME, 3), -4, "row"), "add small:3=-4row"),
        (scale((NAME, 3), 0.5), "scale small:3=0.5"),
    ],
)
def test_an_edit_is_written_as_the_command_line_has_it(edit, text: str):
    kind, value = text.split()

    assert written(edit) == text
    assert parser().parse_args(["generate", "x", f"--{kind}", value]).edits == [edit]


@pytest.mark.parametrize(
    ("arguments", "arms"),
    [
        ("--ablate small:3", [[ABLATED]]),
        ("--arm --ablate small:3 --add small:3=1norm --arm", [[], [ABLATED, STEERED], []]),
        ("--add small:3=1norm --arm --ablate small:3", [[STEERED], [ABLATED]]),
        ("", [[]]),
    ],
)
def test_edits_belong_to_the_arm_before_them(arguments: str, arms: list):
    options = parser().parse_args(["compare", "x", *arguments.split()])

    assert [list(arm) for arm in options.arms] == arms


async def test_compare_shows_arms_side_by_side_and_where_they_part(
    running: Serving, client: SteerClient
):
    sampling = {"temperature": 0, "max_tokens": 6}
    arms: dict[int, tables.Arm] = {}
    async for response in client.compare("hello", [[STEERED], [ABLATED]], **sampling):
        arms.setdefault(response.arm, tables.Arm("")).take(response)

    lines, err = await printed(
        running,
        *("compare", "hello", "--temperature", "0", "--max-tokens", "6", "--arm"),
        *("--add", f"{NAME}:3=1norm", "--arm", "--ablate", f"{NAME}:3"),
    )

    steered, same = arms[1].divergence, arms[2].divergence
    assert steered is not None
    assert same is not None
    assert (steered.first_index, same.HasField("first_index")) == (0, False)
    assert lines[0].split("   ")[0] == "0: no edits"
    assert "1: add small:3=1norm" in lines[0]
    assert lines[0].endswith("2: ablate small:3")
    assert lines[2].startswith(arms[0].text[:1])
    assert f"   [{arms[1].text[1]}]" in lines[2]
    nats = abs(steered.mean_logprob_change)
    assert lines[-2] == (
        f"1: parts at token 0, {arms[1].token(0)} instead of {arms[0].token(0)}; "
        f"0's text is less likely by {nats:.3g} nats a token"
    )
    assert lines[-1].startswith("2: the same tokens; 0's text is ")
    assert "1: small:3 changed 9 of 9 tokens, by 1 |x| on average" in err


def test_the_token_where_arms_part_is_told_by_its_id_when_its_text_did_not_come_alone():
    arm = tables.Arm("")
    arm.take(steering_pb2.CompareResponse(tokens={"first_index": 0, "ids": [7], "text": "a"}))
    arm.take(steering_pb2.CompareResponse(tokens={"first_index": 1, "ids": [8, 9], "text": "bc"}))
    arm.take(steering_pb2.CompareResponse(divergence={"first_index": 2}))

    assert [arm.token(index) for index in range(4)] == ["'a'", "token 8", "token 9", "the end"]
    assert arm.text == "a[bc]"


def test_more_arms_than_fit_beside_each_other_go_below():
    arms = [tables.Arm(f"arm {number}") for number in range(3)]
    for arm in arms:
        arm.take(steering_pb2.CompareResponse(tokens={"ids": [1], "text": "x" * 30 + "\n\r"}))

    lines = list(tables.arms(arms, 60))

    assert lines[0] == f"{'0: arm 0':28}   1: arm 1"
    assert lines[2] == f"{'x' * 28}   {'x' * 28}"
    assert lines[4] == f"{chr(92)}r{' ' * 26}   {chr(92)}r"
    assert lines[6] == "2: arm 2"
    assert max(map(len, lines)) <= 60


async def test_score_shows_what_edits_change(running: Serving, client: SteerClient):
    before = (await client.score("he", ["llo", "l"])).continuations
    after = (await client.score("he", ["llo", "l"], [STEERED])).continuations

    add = ("--add", f"{NAME}:3=1norm")
    lines, err = await printed(running, "score", "he", "llo", "l", *add, "--per-token")
    plain, _ = await printed(running, "score", "he", "llo", "l")

    assert lines[0].split() == ["log-prob", "edited", "change", "tokens", "continuation"]
    rows = [(entry.logprob, other.logprob) for entry, other in zip(before, after, strict=True)]
    per_token = list(zip(before[0].logprobs, after[0].logprobs, strict=True))
    for line, (one, other) in zip(lines[1:6], [rows[0], *per_token, rows[1]], strict=True):
        assert line.split()[:3] == [f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}"]
    assert lines[1].endswith("  3  'llo'")
    assert lines[4].endswith("'o'")
    assert plain[1].split() == [f"{before[0].logprob:.4f}", "3", "'llo'"]
    assert "'llo': small:3 changed 4 of 4 tokens, by 1 |x| on average" in err


async def test_patch_shows_what_each_set_carries_over(running: Serving, client: SteerClient):
    found = await client.patch(
        "hello", "hulks", NAME, [[17], [3, 4], []], token_ids=[ord("l"), ord("b")], top_k=1
    )

    sets = ("--set", "17", "--set", "3, 4", "--set", "")
    lines, err = await printed(
        running, "patch", NAME, "hello", "hulks", *sets, "--answer", "l", "--answer", "b", "--top=1"
    )

    columns = re.split(r" {2,}", lines[0].strip())
    assert columns == [
        *("KL source", "KL target", "|edit|", "patched", "'l'", "'b'", "features", "next")
    ]
    for line, result in zip(lines[3:], found.results, strict=True):
        numbers = [
            f"{result.source_kl:.4f}",
            f"{result.target_kl:.4f}",
            f"{result.edit_norm:.4g}",
            str(result.patched_features),
            *(f"{logprob:.4f}" for logprob in result.next.token_logprobs),
        ]
        assert line.split()[:6] == numbers
        assert repr(result.next.pieces[0]) in line
    names = ("(source)", "(target)", "17", "3, 4", "none")
    assert all(f"  {name}  " in line for name, line in zip(names, lines[1:], strict=True))
    assert lines[2].split()[0] == f"{found.source_target_kl:.4f}"
    count, strongest = len(found.differing_features), found.differing_features[0]
    assert err.startswith(f"{count} features differ, by size: {strongest}, ")


async def test_patch_takes_positions_from_the_end_and_all_features(
    running: Serving, client: SteerClient
):
    running.engine.slot_load = SlotLoad({"resid_post.1": 0}, 32, 0)
    found = await client.patch("hello", "hulk", NAME, positions={-1: -1}, all_features=True)

    lines, _ = await printed(running, "patch", NAME, "hello", "hulk", "--all", "--at=-1:-1")

    (result,) = found.results
    assert "  all that differ  " in lines[-1]
    assert lines[-1].split()[:2] == [f"{result.source_kl:.4f}", f"{result.target_kl:.4f}"]
    assert lines[-1].split()[3] == str(result.patched_features)


async def test_the_experiments_print_json_lines(running: Serving):
    (compared, _), (scored, _), (patched, _) = await asyncio.gather(
        printed(running, "compare", "hello", "--max-tokens=2", "--ablate", f"{NAME}:3", "--json"),
        printed(running, "score", "he", "llo", "--ablate", f"{NAME}:3", "--json"),
        printed(running, "patch", NAME, "hello", "hulks", "--set=3", "--json"),
    )

    assert [json.loads(line)["arm"] for line in compared].count(1) == 5
    assert list(json.loads(compared[-1])) == ["arm", "divergence"]
    assert [list(json.loads(line)) for line in scored] == [["plain"], ["edited"]]
    assert len(json.loads(patched[0])["results"]) == 1


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("compare hello", "nothing to compare with: name an edit, or arms"),
        ("score hello", "the following arguments are required: CONTINUATION"),
        ("patch small hello hulks", "nothing to patch: name features with --set, or --all"),
        ("patch small hello hulks --set 1,x", "'1,x' is not a list of features, such as 17,4"),
        ("patch small hello hulks --all --at 3", "'3' is not TARGET:SOURCE, such as 7:5"),
        ("patch small hello hulks --set 1 --answer lo", "one token is needed, this is 'l', 'o'"),
    ],
)
async def test_wrong_usage_is_explained(running: Serving, command: str, why: str):
    code, out, err = await steer(*command.split(), "--server", running.target)

    assert (code, out) == (2, "")
    assert why in err
    assert "Traceback" not in err
