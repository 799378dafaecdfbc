// node node.mjs FOLDER CASE.json: FOLDER has onnxruntime-node in its node_modules.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { run } from "./run.mjs";

const [folder, path] = process.argv.slice(2);
const ort = createRequire(`${folder}/`)("onnxruntime-node");
const test = JSON.parse(readFileSync(path));
console.log(JSON.stringify(await run(ort, {}, test, readFileSync(test.file))));
