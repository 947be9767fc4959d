/** Print where this reader and the library disagree on the files and folders that cases.json lists. */

import { readFileSync, readdirSync, statSync } from "node:fs";
import { basename, join } from "node:path";
import { isDeepStrictEqual } from "node:util";

import { Pytree2SafetensorsError, blobSource, openFile, openFolder } from "../../docs/_static/pytree2safetensors.js";
import { describeTree } from "./kit.js";

const folder = process.argv[2];
const source = (path) => blobSource(new Blob([readFileSync(path)]), basename(path));

function open(path) {
  if (!statSync(path).isDirectory()) return openFile(source(path));
  return openFolder(readdirSync(path).map((name) => [name, source(join(path, name))]));
}

/** Read a file as the library's test does: what is refused is null. */
async function read(path) {
  const found = { metadata: null, tree: null };
  try {
    const file = await open(path);
    found.metadata = Object.fromEntries(file.metadata);
    found.tree = await describeTree(file, file.tree());
  } catch (error) {
    if (!(error instanceof Pytree2SafetensorsError)) throw error;
  }
  return found;
}

for (const [name, expected] of Object.entries(JSON.parse(readFileSync(join(folder, "cases.json"), "utf8")))) {
  const found = await read(join(folder, name));
  if (!isDeepStrictEqual(found, expected)) {
    console.log(`${name}: the library has ${JSON.stringify(expected)}, and the reader ${JSON.stringify(found)}`);
  }
}
