/** The reader in JavaScript passes the conformance kit. */

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  FileFormatError,
  KeyPathError,
  TreeStructureError,
  decodeValues,
  parseKeyPath,
  spellKeyPath,
} from "../../docs/_static/pytree2safetensors.js";
import { describePath, describeTree, open, readCases, readPath } from "./kit.js";

const CLASSES = { name: KeyPathError, tree: TreeStructureError }; // of reasons; the others are of the format

for (const { file, tree, metadata } of readCases("accepted.json")) {
  test(`${file} loads`, async () => {
    const opened = await open(file);
    assert.deepEqual(Object.fromEntries(opened.metadata), metadata);
    assert.deepEqual(await describeTree(opened, opened.tree()), tree);
  });
}

for (const { file, stage, reason, why } of readCases("refused.json")) {
  test(`${file} is refused: ${why}`, async () => {
    const expected = CLASSES[reason] ?? FileFormatError;
    if (stage === "open") return assert.rejects(open(file), expected);
    const opened = await open(file);
    return assert.rejects(async () => describeTree(opened, opened.tree()), expected);
  });
}

const { accepted, refused } = readCases("keypaths.json");

for (const { string, path } of accepted) {
  test(`the key path ${JSON.stringify(string)} is read and spelled`, () => {
    assert.deepEqual(describePath(parseKeyPath(string)), path);
    assert.equal(spellKeyPath(readPath(path)), string);
  });
}

for (const string of refused) {
  test(`the key path ${JSON.stringify(string)} is refused`, () => {
    assert.throws(() => parseKeyPath(string), KeyPathError);
  });
}

for (const [dtype, values] of Object.entries(readCases("values.json"))) {
  test(`the values of ${dtype} are those of NumPy`, () => {
    const wide = dtype === "float16" || dtype === "bfloat16";
    const codes = wide ? Uint16Array.from(values, (_, i) => 257 * i) : Uint8Array.from(values.keys());
    const found = decodeValues(new Uint8Array(codes.buffer), dtype);
    assert.deepEqual(Array.from(found, toHex), values);
  });
}

/** Write a float as Python's `float.hex` does. */
function toHex(value) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value < 0 ? "-inf" : "inf";
  const sign = Object.is(Math.sign(value), -0) || value < 0 ? "-" : "";
  let [mantissa, exponent] = [Math.abs(value), 0];
  if (!mantissa) return `${sign}0x0.0p+0`;
  for (; mantissa >= 2; exponent++) mantissa /= 2;
  for (; mantissa < 1; exponent--) mantissa *= 2;
  const digits = Math.round((mantissa - 1) * 2 ** 52).toString(16).padStart(13, "0");
  return `${sign}0x1.${digits}p${exponent < 0 ? "" : "+"}${exponent}`;
}
