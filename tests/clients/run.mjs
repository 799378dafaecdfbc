// One case of tests/clients.py in a build of ONNX Runtime for JavaScript; what client.py gives.

const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

export async function run(ort, options, test, model) {
  const result = { version: ort.env.versions.common, loaded: false, reason: null, values: [] };
  try {
    const session = await ort.InferenceSession.create(model, options);
    result.loaded = true;
    const feeds = {};
    for (const [name, { dtype, shape, values }] of Object.entries(test.feeds)) {
      const numbers = dtype === "int64" ? values.map(BigInt) : values;
      feeds[name] = new ort.Tensor(dtype, ARRAYS[dtype].from(numbers), shape);
    }
    let outputs;
    for (let k = 0; k < test.loops; k++) {
      outputs = await session.run(feeds);
      for (const [name, output] of Object.entries(test.carry)) feeds[name] = outputs[output];
    }
    result.values = Array.from(outputs[test.output].data);
  } catch (error) {
    result.reason = String(error.message ?? error);
  }
  return result;
}
