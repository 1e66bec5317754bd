// A client that no stub of ours is in: it loads the protos as they are. Prints what it got as one JSON object.
//   node client.js HOST:PORT PROTOS DICTIONARY
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [target, protos, dictionary] = process.argv.slice(2);
const names = ["steering", "dictionaries"].map((name) => `steer/v1/${name}.proto`);
const options = { includeDirs: [protos], keepCase: true, longs: Number, enums: String, oneofs: true };
const { steer } = grpc.loadPackageDefinition(loader.loadSync(names, options));
const credentials = grpc.credentials.createInsecure();
const steering = new steer.v1.SteeringService(target, credentials);
const dictionaries = new steer.v1.DictionaryService(target, credentials);

const prompt = { text: "When Mary and John went to the store, John gave a drink to" };
const steered = [
  { dictionary, feature: 9, add: { value: 0.5, unit: "UNIT_RELATIVE_NORM" } },
];

function unary(client, method, request) {
  return new Promise((resolve, reject) =>
    client[method](request, (error, response) => (error ? reject(error) : resolve(response))),
  );
}

function generation(max_tokens, edits) {
  return { prompt, edits, sampling: { max_tokens, temperature: 0, ignore_eos: true } };
}

async function stream() {
  const found = { kinds: [], ids: [], text: "" };
  const call = steering.GenerateStream({ generation: generation(8, steered) });
  for await (const response of call) {
    found.kinds.push(response.event);
    if (response.event !== "tokens") continue;
    found.ids.push(...response.tokens.ids);
    found.text += response.tokens.text;
  }
  return found;
}

async function session() {
  const found = { ids: [], applied: null, finished: null };
  const call = steering.Session();
  call.write({ start_turn: { generation: generation(24, []) } });
  let asked = false;
  for await (const response of call) {
    if (response.event === "tokens") {
      found.ids.push(...response.tokens.ids);
      if (found.ids.length >= 4 && !asked) {
        asked = true;
        call.write({ update: { edits: steered, update_id: 7 } });
      }
    }
    if (response.event === "update_applied") found.applied = response.update_applied;
    if (response.event === "turn_finished") {
      found.finished = response.turn_finished;
      call.end();
    }
  }
  return found;
}

async function refused() {
  const edits = [{ dictionary, feature: 9, clamp: { value: 1 } }];
  try {
    await unary(steering, "Generate", { generation: generation(1, edits) });
  } catch (error) {
    return { code: grpc.status[error.code], details: error.details };
  }
  return null;
}

async function main() {
  const listed = await unary(dictionaries, "ListDictionaries", {});
  const found = {
    dictionaries: listed.dictionaries.map((entry) => entry.name),
    generated: await unary(steering, "Generate", { generation: generation(8, steered) }),
    streamed: await stream(),
    session: await session(),
    refused: await refused(),
  };
  console.log(JSON.stringify(found));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
