"""The case studies as a section of the report."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from tqdm import tqdm

from trainer.compare import Table
from trainer.errors import BadConfig
from trainer.paper.cases.activates import LEAST, Rating
from trainer.paper.cases.draw import causal_tree, effects, histograms, shown
from trainer.paper.cases.effects import LIKELY, VISIBLE
from trainer.paper.cases.study import LEAST_FALL, MONOSEMANTIC, Study
from trainer.paper.cases.tree import Node, tree
from trainer.paper.cases.verdicts import (
    LEAST_CHANGE,
    OVER_PLACEBO,
    OVER_USUAL,
    TWICE,
    Change,
    answer_falls,
    caused,
    monosemantic,
    specific,
)
from trainer.paper.lab import Lab
from trainer.paper.page import Finding, Section


def experiment(lab: Lab) -> Section:
    """What activates a feature, what it does, what causes it."""
    if not lab.config.cases.dictionary:
        raise BadConfig("cases.dictionary names no folder; it is the dictionary to study")
    study = Study(lab)
    parts = (_activation, _answer, _effects, _causes)
    findings = [part(study) for part in tqdm(parts, desc="case studies", unit=" parts")]
    settings = lab.config.cases
    about = (
        f"Single features of {study.stored.folder} ({study.stored.card.architecture} at "
        f"{study.stored.card.site}, {study.stored.card.n_features:,} features) on {study.contexts.numel():,} held-out "
        f"tokens in contexts of {settings.context}. An activation is strong from half of the feature's maximum on; "
        "tokens that differ only in case and in spaces around them count as one kind. A feature is ablated by "
        "subtracting f W_dec (the paper's less-than-rank-one ablation), so that what the dictionary does not "
        "reconstruct stays, at every position but attention sinks."
    )
    return Section("Case studies", about, findings)


def _activation(study: Study) -> Finding:
    found, names = study.activates, ("feature", "coordinate")
    shares = {name: found[f"{name}_tokens"][0][1] for name in names}
    rated = {name: [Rating(*rating) for rating in found[f"{name}s"]] for name in names}
    verdict = monosemantic(shares["feature"], shares["coordinate"])
    titles = {name: f"{name} {found[name]} of {study.stored.card.site}" for name in names}
    figure = histograms(
        [(titles[name], found[f"{name}_histogram"]) for name in names],
        "Tokens in each tenth of the activation, numbers of tokens above; the paper's feature 556 and the basis."
        if study.settings.bins == 10
        else "Tokens in each range of the activation, numbers of tokens above.",
    )
    because = (
        f"On the last token of “{study.settings.sentence}”, here {found['sentence'][-1]!r}, {_passed_over(study)} "
        f"Of its strong activations {shares['feature']:.0%} are on {found['feature_tokens'][0][0]!r}. The contrast is the "
        f"coordinate that is fullest there, at {found['coordinate_full']:.0%} of its own maximum: "
        f"{shares['coordinate']:.0%} of its strong activations are on {found['coordinate_tokens'][0][0]!r}. "
        f"{_population(rated['feature'], 'features')} {_population(rated['coordinate'], 'coordinates')} Rule: at least "
        f"{MONOSEMANTIC:.0%} and {TWICE:g} times the coordinate's."
    )
    rows = [
        [str(feature), f"{value:.2f}", f"{density:.2%}", "passed over" if dense else ""]
        for feature, value, density, dense in found["found"]
    ]
    table = Table(["feature", "activation at the sentence's end", "density", ""], rows)
    return Finding(
        "What activates a feature",
        "a feature is active on one kind of token, here the apostrophe, and most so where it is strongest, while a "
        "coordinate of the residual stream is strong on many (section 5.1, figure 4)",
        verdict,
        because,
        [table],
        [figure],
    )


def _passed_over(study: Study) -> str:
    found = study.activates
    dense = [str(feature) for feature, _, _, skipped in found["found"] if skipped]
    (value,) = [value for feature, value, *_ in found["found"] if feature == found["feature"]]
    usual = f"feature {found['feature']} has the largest activation ({value:.2f})"
    if not dense:
        return f"{usual}; no outlier feature had to be passed over."
    return (
        f"{usual} once those active on more than {study.settings.dense:.0%} of all tokens are passed over "
        f"({', '.join(dense)}), as in the paper."
    )


def _population(rated: Sequence[Rating], name: str) -> str:
    if not rated:
        return f"No {name} have {LEAST} strong activations."
    middle = median(rating.share for rating in rated)
    single = sum(rating.share >= MONOSEMANTIC for rating in rated) / len(rated)
    return (
        f"Of the {len(rated):,} {name} with {LEAST} strong activations {single:.0%} have {MONOSEMANTIC:.0%} of them on "
        f"one kind of token (median {middle:.0%})."
    )


def _answer(study: Study) -> Finding:
    feature, answer = study.activates["feature"], study.settings.answer
    elsewhere = study.effect_of(feature, study.answer)
    found = [("at the sentence's end", study.on_sentence())]
    found += [("in held-out text", elsewhere)] if elsewhere else []
    told = "; ".join(
        f"{where} (contexts: {each['contexts']}) the logit changes by {each['logit']:+.2f}, rank {each['rank']:,} among "
        f"the falls of the vocabulary, the log-probability by {each['log_probability']:+.3f} from a probability of "
        f"{each['probability']:.3f}, by the placebo {each['placebo']:+.3f}"
        for where, each in found
    )
    because = (
        f"Of {answer!r} without feature {feature}: {told}. "
        + (
            ""
            if elsewhere
            else "In held-out text the feature is too rarely strong to be measured. "
        )
        + f"The sentence's last token comes {study.activates['in_text']:,} times in the held-out text. Rule: in one of these no "
        f"logit falls further; “differs” if in one the log-probability falls by {LEAST_CHANGE} nats and "
        f"{OVER_PLACEBO:g} times the placebo's change. The paper shows logits; next to a probability of 1 they say more than "
        "log-probabilities, elsewhere less, for what moves all logits alike moves nothing."
    )
    changes = [
        Change(each["logit"], each["rank"], each["log_probability"], each["placebo"])
        for _, each in found
    ]
    return Finding(
        "What the sentence's feature does",
        "without the apostrophe feature the logit of “s” falls most (section 5.2, figure 4)",
        answer_falls(changes),
        because,
        [_effect_table((f"{feature}, {where}", each) for where, each in found)],
        [effects(f"feature {feature}, {where}", each, _EFFECT) for where, each in found],
    )


_EFFECT = (
    "Left: the logits that fall most, as in the paper. Right: log-probabilities that fall and rise most, of tokens with a "
    f"probability of at least {LIKELY:g} before; a change of all logits alike is none of these."
)


def _effects(study: Study) -> Finding:
    tried = study.candidates()
    found: list[tuple[int, dict[str, Any]]] = []
    for feature, token, _ in sorted(tried, key=lambda candidate: candidate[2]):
        if len(found) < study.settings.effects:
            measured = study.effect_of(feature, token)
            found += [(feature, measured)] if measured else []
    numbers = ", ".join(
        f"{feature} on {each['token']!r} {each['log_probability']:+.2f} (placebo {each['placebo']:+.2f}, falls in "
        f"{each['falls']:.0%} of {each['contexts']} contexts)"
        for feature, each in found
    )
    because = (
        f"Of the most monosemantic features of {len(tried)} kinds of token those were taken that lower the log-probability of one "
        f"likely token most in the first half of the text; measured in the second half, on the same tokens: "
        f"{numbers or 'none could be measured'}. The placebo is another feature of the same place, whose part of x is closest in "
        f"length. Rule, for all of them: a fall of at least {LEAST_CHANGE} nats and {OVER_PLACEBO:g} times the placebo's change; "
        "“differs” if it holds for some."
    )
    changes = [(each["log_probability"], each["placebo"]) for _, each in found]
    return Finding(
        "What other features do",
        "ablating a feature has an effect on particular next tokens that fits what activates it (section 5.2)",
        specific(changes),
        because,
        [_effect_table((_named(study, feature), each) for feature, each in found)],
        [effects(f"feature {_named(study, feature)}", each, _EFFECT) for feature, each in found],
    )


def _named(study: Study, feature: int) -> str:
    (kind,) = [rating.kind for rating in study.rated if rating.feature == feature]
    return f"{feature} (active on {shown(kind)})"


def _effect_table(found: Iterable[tuple[str, dict[str, Any]]]) -> Table:
    header = [
        "feature",
        "contexts",
        "token",
        "logit",
        "rank",
        f"logits below {-VISIBLE}",
        "log-probability",
        "placebo",
        "falls in",
    ]
    rows = [
        [
            name,
            str(each["contexts"]),
            repr(each["token"]),
            f"{each['logit']:+.2f}",
            f"{each['rank']:,}",
            f"{each['visible']:,}",
            f"{each['log_probability']:+.3f}",
            f"{each['placebo']:+.3f}",
            f"{each['falls']:.0%}",
        ]
        for name, each in found
    ]
    return Table(header, rows)


def _causes(study: Study) -> Finding:
    target = study.tree_target()
    root = tree(study, study.stored, target.feature)
    groups = study.causes_of(study.stored, target.feature)
    best = max(root.causes, key=lambda cause: cause.fall, default=None)
    if best is None:
        verdict, told = caused(0.0, None, 0.0), "No earlier feature lowers it."
    else:
        usual = next(group["median"] for group in groups if group["site"] == best.site)
        verdict = caused(best.fall, best.fresh, usual)
        fresh = "" if best.fresh is None else f", in fresh contexts by {best.fresh:.0%}"
        told = (
            f"Without {best.site} #{best.feature} it falls by {best.fall:.0%}{fresh}; without an active feature of that "
            f"site usually (median) by {usual:.2%}."
        )
    because = (
        f"Feature {target.feature} of {study.stored.card.site} is strong on {target.kind!r} "
        f"({target.share:.0%}). {told} All features of {', '.join(group['site'] for group in groups)} that are active in the "
        f"contexts were ablated one by one (any other changes nothing), with the layers in between run. Rule: the "
        f"strongest cause's fall, in fresh contexts, is at least {LEAST_CHANGE:.0%} and {OVER_USUAL:g} times the usual one. "
        "The paper goes from layer to layer; here the earlier dictionaries are those of the layer before and of the layer's "
        "own two sublayers, and causes are measured again in contexts that they were not chosen in."
    )
    caption = (
        "An edge says how much less active its left end is, over its mean activation, without the right one; in brackets the same in fresh "
        f"contexts. Causes below {LEAST_FALL:.0%} are left out."
    )
    return Finding(
        "What causes a feature",
        "few earlier features, with a meaning of their own, cause a feature; its tree explains where it comes from "
        "(section 5.3, figure 5)",
        verdict,
        because,
        [_cause_table(groups), _tree_table(root)],
        [causal_tree(root, caption)],
    )


def _cause_table(groups: Sequence[dict[str, Any]]) -> Table:
    header = ["causes from", "contexts", "fresh", "active features", "above 10%", "median fall"]
    rows = [
        [
            group["site"],
            *map(str, group["contexts"]),
            f"{group['active']:,}",
            str(group["above_tenth"]),
            f"{group['median']:.2%}",
        ]
        for group in groups
    ]
    return Table(header, rows)


def _tree_table(root: Node) -> Table:
    """The tree's nodes, each below what it causes."""
    rows: list[list[str]] = []

    def add(node: Node, level: int) -> None:
        kinds = ", ".join(f"{kind!r} {share:.0%}" for kind, share in node.tokens)
        fresh = "-" if node.fresh is None else f"{node.fresh:.0%}"
        fall = f"{node.fall:.0%}" if level else "-"
        rows.append(["· " * level + f"{node.site} #{node.feature}", fall, fresh, kinds])
        for cause in node.causes:
            add(cause, level + 1)

    add(root, 0)
    return Table(["feature", "fall of the one above", "in fresh contexts", "strong on"], rows)
