/** What the reader in JavaScript does beyond the conformance kit: addresses, parts of tensors, errors. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { createServer } from "node:http";
import { after, before, test } from "node:test";

import {
  FileFormatError,
  KeyPathError,
  Key,
  Leaf,
  Node,
  blobSource,
  compareText,
  decodeValues,
  openFile,
  openFolder,
  openIndex,
  openUrl,
  spellKey,
} from "../../docs/_static/pytree2safetensors.js";

/** Make a file from tensors, each a dtype, a shape and its bytes. */
function makeFile(tensors, metadata = {}) {
  const header = { __metadata__: metadata };
  let size = 0;
  for (const [name, { dtype, shape, bytes }] of Object.entries(tensors)) {
    header[name] = { dtype, shape, data_offsets: [size, (size += bytes.length)] };
  }
  const text = new TextEncoder().encode(JSON.stringify(header));
  const length = new Uint8Array(new BigUint64Array([BigInt(text.length)]).buffer);
  return new Blob([length, text, ...Object.values(tensors).map(({ bytes }) => bytes)]);
}

const counts = (length) => Uint8Array.from({ length }, (_, i) => i);
const large = { dtype: "I16", shape: [500, 1000], bytes: counts(1_000_000) };
const small = { dtype: "C64", shape: [2], bytes: new Uint8Array(new Float32Array([1, 2, 3, 4]).buffer) };
const FILES = { "/model.safetensors": makeFile({ "@large": large, "@small": small }) };
const index = { metadata: {}, weight_map: { "@large": "a b%.safetensors", "@small": "c.safetensors" } };
FILES["/model.safetensors.index.json"] = new Blob([JSON.stringify(index)]);
FILES["/a b%.safetensors"] = makeFile({ "@large": large });
FILES["/c.safetensors"] = makeFile({ "@small": small });

const ALL = ["whole", "chunked", "huge"]; // modes in which the server ignores ranges
let requests = [];
let queries = [];
let versions = {}; // headers of all answers
const server = createServer(async ({ url, method, headers }, response) => {
  const { pathname, search } = new URL(url, "http://localhost");
  const [, mode, path] = /^\/(\w+)(\/.*)$/.exec(decodeURIComponent(pathname));
  requests.push(`${method} ${headers.range ?? ""}`);
  queries.push(search);
  const blob = FILES[path];
  if (!blob || method !== "GET") return response.writeHead(blob ? 405 : 404).end();
  const [, from, to] = (!ALL.includes(mode) && /^bytes=(\d+)-(\d+)$/.exec(headers.range)) || [];
  if (Number(from) >= blob.size) return response.writeHead(416).end();
  const start = mode === "shifted" && from > 0 ? Number(from) - 1 : Number(from);
  const stop = mode === "longer" && from > 0 ? Number(to) + 2 : Number(to) + 1;
  const part = from ? blob.slice(start, stop) : blob;
  if (mode !== "chunked") response.setHeader("Content-Length", mode === "huge" ? 2 ** 27 : part.size);
  if (from && mode !== "hidden") {
    response.setHeader("Content-Range", `bytes ${start}-${start + part.size - 1}/${blob.size}`);
  }
  response.writeHead(from ? 206 : 200, versions);
  return response.end(Buffer.from(await part.arrayBuffer()));
});
let origin;
before(async () => {
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  origin = `http://127.0.0.1:${server.address().port}`;
});
after(() => server.close());

test("a file at an address is read by ranges", async () => {
  requests = [];
  const file = await openUrl(`${origin}/parts/model.safetensors`);
  assert.deepEqual(requests, ["GET bytes=0-131071"]);
  assert.deepEqual([...(await file.values("@large", 10, 13))], [0x1514, 0x1716, 0x1918]);
  assert.equal(requests.length, 2);
});

test("the end of a file is asked for where the answer does not tell the size", async () => {
  requests = [];
  const { size } = FILES["/model.safetensors"];
  await openUrl(`${origin}/hidden/model.safetensors`);
  assert.deepEqual(requests, ["GET bytes=0-131071", `GET bytes=${size - 1}-${size}`]);
});

for (const [change, reason] of [[1, /has bytes after its data/], [-1, /is cut short/], [-500_000, /is cut short/]]) {
  test(`a file whose size is not told, and which is ${change} bytes too long, is refused`, async () => {
    const sound = FILES["/model.safetensors"];
    FILES["/odd.safetensors"] = new Blob([sound.slice(0, sound.size + change), "x".repeat(Math.max(change, 0))]);
    await assert.rejects(openUrl(`${origin}/hidden/odd.safetensors`), reason);
  });
}

const other = makeFile({ "@large": large, "@small": { ...small, bytes: new Uint8Array(16) } });
const CHANGES = {
  "its tag": [{ ETag: '"1"' }, { ETag: '"2"' }],
  "its time": [{ "Last-Modified": "Sat, 28 Nov 2026 01:00:00 GMT" }, { "Last-Modified": "Sat, 28 Nov 2026 01:00:01 GMT" }],
  "its size": [{}, {}, new Blob([other, "x"])],
};
for (const [what, [before, after, content = other]] of Object.entries(CHANGES)) {
  test(`a file that is replaced while it is read is refused: ${what}`, async () => {
    [FILES["/replaced.safetensors"], versions] = [FILES["/model.safetensors"], before];
    const file = await openUrl(`${origin}/parts/replaced.safetensors`);
    [FILES["/replaced.safetensors"], versions] = [content, after];
    const reading = file.values("@small");
    await assert.rejects(reading, /was replaced while it was read: open it again$/).finally(() => (versions = {}));
  });
}

for (const mode of ["shifted", "longer"]) {
  test(`an answer with another range is refused: ${mode}`, async () => {
    const file = await openUrl(`${origin}/${mode}/model.safetensors`);
    await assert.rejects(file.values("@large", 0, 2), /answers with another part of the file$/);
  });
}

for (const mode of ["whole", "chunked"]) {
  test(`a server without ranges sends a small file once: ${mode}`, async () => {
    requests = [];
    const file = await openUrl(`${origin}/${mode}/model.safetensors`);
    assert.deepEqual([...(await file.values("@small"))], [1, 2, 3, 4]);
    assert.deepEqual(requests, ["GET bytes=0-131071"]);
  });
}

test("a server without ranges is not asked for a large file", async () => {
  await assert.rejects(openUrl(`${origin}/huge/model.safetensors`), /does not serve parts of files$/);
});

test("an index at an address leads to its shards", async () => {
  const file = await openUrl(`${origin}/parts/model.safetensors.index.json`);
  assert.deepEqual([...file.tensors.keys()], ["@large", "@small"]);
  assert.deepEqual([...(await file.values("@small", 1))], [3, 4]);
});

test("the shards of an index are asked for with its query", async () => {
  queries = [];
  await openUrl(`${origin}/parts/model.safetensors.index.json?key=a%2Fb`);
  assert.deepEqual(queries, ["?key=a%2Fb", "?key=a%2Fb", "?key=a%2Fb"]);
});

test("the headers of many shards are read a few at a time", async () => {
  const names = Array.from({ length: 100 }, (_, i) => `${i}.safetensors`);
  const index = { weight_map: Object.fromEntries(names.map((name, i) => [`@${i}`, name])) };
  let [reading, most] = [0, 0];
  const find = (name) => {
    const source = blobSource(makeFile({ [`@${parseInt(name)}`]: small }));
    const read = async (start, stop) => {
      most = Math.max(most, ++reading);
      await new Promise(setImmediate);
      reading--;
      return source.read(start, stop);
    };
    return { ...source, read };
  };
  const file = await openIndex(blobSource(new Blob([JSON.stringify(index)])), find);
  assert.equal(file.tensors.size, 100);
  assert.equal(most, 24);
});

test("no more headers are read after one of them fails", async () => {
  const names = Array.from({ length: 100 }, (_, i) => `${i}.safetensors`);
  const index = { weight_map: Object.fromEntries(names.map((name, i) => [`@${i}`, name])) };
  let reads = 0;
  const find = (name) => {
    const source = blobSource(makeFile({ [`@${parseInt(name)}`]: small }));
    const read = async (start, stop) => {
      reads++;
      await new Promise(setImmediate);
      if (name === "3.safetensors") throw new Error("refused");
      return source.read(start, stop);
    };
    return { ...source, read };
  };
  await assert.rejects(openIndex(blobSource(new Blob([JSON.stringify(index)])), find), /^Error: refused$/);
  for (let turn = 0; turn < 100; turn++) await new Promise(setImmediate);
  assert.ok(reads < 30, `${reads} headers were read`);
});

test("a missing address is an error with its status", async () => {
  await assert.rejects(openUrl(`${origin}/parts/none.safetensors`), /answers with status 404$/);
});

test("parts of a tensor are read, and nothing beyond its end", async () => {
  const file = await openFile(blobSource(FILES["/model.safetensors"]));
  assert.deepEqual([...(await file.values("@small", 1, 100))], [3, 4]);
  assert.equal((await file.values("@large")).length, 500_000);
  assert.equal(await file.check("@small"), false); // no digests
});

test("values outside of a tensor are refused", async () => {
  const file = await openFile(blobSource(FILES["/model.safetensors"]));
  for (const [start, stop] of [[-1], [0.5], [NaN], [3], [2, 1]]) {
    await assert.rejects(file.values("@small", start, stop), { name: "RangeError", message: /"@small"/ });
  }
  assert.equal((await file.values("@small", 2)).length, 0);
  assert.equal((await file.values("@small", 1, 1)).length, 0);
});

test("values keep their bits, and are a copy", () => {
  const signalling = Buffer.from("0100807f", "hex"); // a part of a larger pool
  assert.equal(Buffer.from(decodeValues(signalling, "float32").buffer).toString("hex"), "0100807f");
  assert.deepEqual(decodeValues(Buffer.from([0, 2]), "bool"), Uint8Array.of(0, 1));
  assert.equal(decodeValues(Buffer.from([0, 2]), "float16").length, 1);
  const bytes = Uint8Array.of(1);
  decodeValues(bytes, "uint8")[0] = 2;
  assert.equal(bytes[0], 1);
});

test("the sizes of a leaf are numbers, and those of a tensor are exact", async () => {
  const text = '{"@a":{"dtype":"U8","shape":[0,9007199254740993],"data_offsets":[0,0]}}';
  const file = await openFile(blobSource(new Blob([new BigUint64Array([BigInt(text.length)]), text])));
  assert.deepEqual(file.leaves.get("@a").shape, [0, 2 ** 53]);
  assert.deepEqual(file.tensors.get("@a").shape, [0, 9007199254740993n]);
});

test("names that are too deep take no tree's memory", async () => {
  const name = "@".repeat(300_000);
  const noted = (nodes) => ({ pytree2safetensors: JSON.stringify({ version: 1, nodes }) });
  for (const metadata of [{}, noted({ [name]: "tuple" })]) {
    const before = process.memoryUsage().heapUsed;
    const file = await openFile(blobSource(makeFile({ [`${name}#0`]: small }, metadata)));
    assert.throws(() => file.tree(), { name: "TreeStructureError", message: /is nested too deep$/ });
    assert.ok(process.memoryUsage().heapUsed - before < 60e6);
  }
  const below = makeFile({ [name]: small }, noted({ [`${name}@`]: "tuple" }));
  await assert.rejects(openFile(blobSource(below)), { name: "FileFormatError", message: /at or below a leaf$/ });
});

test("a tensor of several blocks is checked by its blocks", async () => {
  const bytes = new Uint8Array(40 * 2 ** 20).map((_, i) => i % 251);
  const sha = (...parts) => {
    const state = createHash("sha256");
    for (const part of parts) state.update(part);
    return state.digest();
  };
  const block = 16 * 2 ** 20;
  const blocks = [0, 1, 2].map((i) => sha(bytes.subarray(i * block, (i + 1) * block)));
  const digest = (...parts) => sha(...parts).toString("hex").slice(0, 32);
  const digests = JSON.stringify({ "@w": digest(`["@w","U8",[${bytes.length}]]`, ...blocks) });
  const own = { "pytree2safetensors.sha256": digests };
  own["pytree2safetensors.sha256.metadata"] = digest(JSON.stringify(own));
  const make = () => openFile(blobSource(makeFile({ "@w": { dtype: "U8", shape: [bytes.length], bytes } }, own)));
  assert.equal(await (await make()).check("@w"), true);
  assert.equal(await (await make()).check("@w", () => false), false); // nobody waits
  bytes[35 * 2 ** 20] ^= 1;
  await assert.rejects((await make()).check("@w"), FileFormatError);
});

test("a tree is made of nodes and leaves", async () => {
  const tree = (await openFile(blobSource(FILES["/model.safetensors"]))).tree();
  assert.ok(tree instanceof Node);
  assert.deepEqual(tree.items.map(([key]) => key), ["large", "small"]);
  assert.ok(tree.items[0][1] instanceof Leaf);
  const { kind, name, dtype, shape } = tree.items[1][1];
  assert.deepEqual({ kind, name, dtype, shape }, { kind: "array", name: "@small", dtype: "complex64", shape: [2] });
});

test("a file without a name is called the file", async () => {
  await assert.rejects(openFile(blobSource(new Blob(["x"]))), {
    name: "FileFormatError",
    message: "the file has 1 bytes and is no safetensors file",
  });
});

test("a folder without a checkpoint is refused", async () => {
  await assert.rejects(openFolder([["a.txt", blobSource(new Blob())]]), FileFormatError);
});

test("names of objects are names like others", async () => {
  const names = ["__proto__", "constructor", "hasOwnProperty", "toString"];
  const tensor = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}';
  const text = `{${names.map((name) => `"@${name}":${tensor}`)}}`;
  const length = new Uint8Array(new BigUint64Array([BigInt(text.length)]).buffer);
  const file = await openFile(blobSource(new Blob([length, text])));
  assert.deepEqual(file.tree().items.map(([key]) => key), ["__proto__", "constructor", "hasOwnProperty", "toString"]);
});

test("what has no spelling is refused", () => {
  const cases = [
    ["item", NaN], ["item", Infinity], ["item", undefined], ["item", {}], ["item", "\ud800"], ["attr", 1],
    ["index", -1], ["index", 0.5], ["index", 2 ** 31], ["flat", "1"], ["item", 10n ** 4300n], ["item", ["\udfff"]],
    ["item", Array.from({ length: 65 }).reduce((inner) => [inner], null)],
  ];
  for (const [kind, value] of cases) assert.throws(() => spellKey(new Key(kind, value)), KeyPathError);
});

test("text is compared by code points", () => {
  const sorted = ["", "a", "ab", "b", "\ue000", "\uffff", "\u{10000}", "\u{10000}a", "\u{10001}"];
  assert.deepEqual([...sorted].reverse().sort(compareText), sorted);
});
