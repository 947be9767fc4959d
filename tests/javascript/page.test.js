/** What the page "Look inside a file" shows, without a browser. */

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  describe, describeStatistics, formatValue, openFiles, rawAddress, rowsOf, statistics,
} from "../../docs/_static/inspect_model.js";
import { Leaf, blobSource, openFile } from "../../docs/_static/pytree2safetensors.js";

/** Open a file of tensors, each a dtype and a typed array. */
function fileOf(tensors) {
  let size = 0;
  const entry = ([name, [dtype, values]]) => [
    name,
    { dtype, shape: [values.length], data_offsets: [size, (size += values.byteLength)] },
  ];
  const text = new TextEncoder().encode(JSON.stringify(Object.fromEntries(Object.entries(tensors).map(entry))));
  const arrays = Object.values(tensors).map(([, values]) => values);
  return new File([new BigUint64Array([BigInt(text.length)]), text, ...arrays], "model-00001-of-00002.safetensors");
}

/** Tell what the page shows of the statistics of a vector. */
async function shownOf(dtype, values, isCurrent = () => true) {
  const file = await openFile(blobSource(fileOf({ "@w": [dtype, values] })));
  const leaf = Object.assign(file.leaves.get("@w"), { count: values.length });
  const found = await statistics(file, leaf, Infinity, isCurrent);
  return found && Object.fromEntries(describeStatistics(leaf, found));
}

test("what is no integer does not look like one", () => {
  const cases = [
    [0, "0"], [-0, "-0"], [7n, "7"], [1234567, "1234567"], [0.1, "0.1"], [1 / 3, "0.333333"], [1e-7, "1e-7"],
    [12345.67, "12345.7"], [99999.96, "100000.0"], [1234567.8, "1234567.8"], [16777216.5, "16777216.5"],
    [0.99999999, "1.00000"], [-3.0000001, "-3.00000"], [2.5, "2.5"], [1e300, "1e+300"], [NaN, "NaN"], [-Infinity, "-inf"],
  ];
  for (const [value, text] of cases) assert.equal(formatValue(value), text);
});

test("the extremes of integers are exact", async () => {
  const [least, most] = [-9223372036854775807n, 9223372036854775807n];
  const { min, max } = await shownOf("I64", BigInt64Array.of(9007199254740993n, most, least));
  assert.deepEqual([min, max], [`${least}`, `${most}`]);
});

test("moments beyond the doubles are not shown as numbers", async () => {
  const beyond = "beyond the range of float64";
  assert.deepEqual(await shownOf("F64", Float64Array.of(1.7e308, -1.7e308)), {
    "statistics of": "all 2 values", min: "-1.7e+308", max: "1.7e+308", mean: beyond, std: beyond, zeros: "0",
  });
  const { mean, std } = await shownOf("F64", Float64Array.of(1e200, -1e200));
  assert.deepEqual([mean, std], ["0", beyond]);
});

test("statistics end when nobody waits for them", async () => {
  assert.equal(await shownOf("U8", new Uint8Array(9), () => false), undefined);
});

test("one shard of a folder is no checkpoint", async () => {
  const shard = fileOf({ "@w": ["U8", new Uint8Array(2)] });
  assert.equal((await openFiles([shard], false)).tensors.size, 1);
  await assert.rejects(openFiles([shard], true), /and no index$/);
  await assert.rejects(openFiles([], true), /^FileFormatError: the folder has no safetensors file and no index$/);
});

test("the page of a file on the Hub leads to the file", () => {
  const hub = "https://huggingface.co";
  for (const [page, file] of [
    ["/u/r/blob/main/blob/x", "/u/r/resolve/main/blob/x"],
    ["/datasets/u/r/blob/main/x", "/datasets/u/r/resolve/main/x"],
    ["/gpt2/blob/main/x", "/gpt2/resolve/main/x"],
    ["/u/r/resolve/main/blob/x", "/u/r/resolve/main/blob/x"],
  ]) {
    assert.equal(rawAddress(hub + page), hub + file);
  }
  assert.equal(rawAddress("https://example.org/u/r/blob/main/x"), "https://example.org/u/r/blob/main/x");
});

test("names that form no tree are cut at their first hundred dots", async () => {
  const names = ["a", "a.b", "a.", `x${".".repeat(99)}`, `x${".".repeat(100)}`, `x${".y".repeat(500_000)}`];
  const tensors = Object.fromEntries(names.map((name) => [name, ["U8", new Uint8Array(1)]]));
  const { root, problem } = rowsOf(await openFile(blobSource(fileOf(tensors))));
  assert.ok(problem);
  const leaves = [];
  const collect = (row, labels) => {
    if (row.content instanceof Leaf) leaves.push([row.content.name, labels.length]);
    for (const child of row.children) collect(child, [...labels, child.label]);
  };
  collect(root, []);
  assert.deepEqual(new Set(leaves.map(([name]) => name)), new Set(names));
  assert.equal(Math.max(...leaves.map(([, depth]) => depth)), 101);
});

test("the implementation of a key is shortened", () => {
  const text = describe(new Leaf("key", "@k", { shape: [2], impl: "k".repeat(1000) }));
  assert.equal(text, `key<${"k".repeat(60)}…>[]`);
});
