/** The conformance kit as JavaScript sees it: its files, and trees in the form of its README. */

import { readFileSync, readdirSync, statSync } from "node:fs";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";

import { Key, Leaf, blobSource, openFile, openFolder } from "../../docs/_static/pytree2safetensors.js";

const KIT = fileURLToPath(new URL("../conformance/kit/", import.meta.url));

export const readCases = (name) => JSON.parse(readFileSync(join(KIT, name), "utf8"));

/** Open a file or a folder of the kit. */
export async function open(name) {
  const path = join(KIT, name);
  const source = (file) => blobSource(new Blob([readFileSync(file)]), basename(file));
  if (!statSync(path).isDirectory()) return openFile(source(path));
  return openFolder(readdirSync(path).map((file) => [file, source(join(path, file))]));
}

const hex = (bytes) => Buffer.from(bytes.buffer ?? bytes, bytes.byteOffset, bytes.byteLength).toString("hex");
const bitsOf = (number) => hex(new Float64Array([number]));
const pythonHex = (value) => (value < 0n ? `-0x${(-value).toString(16)}` : `0x${value.toString(16)}`);

export function describeKey(key) {
  if (typeof key === "string") return key;
  if (key === null) return { None: null };
  if (typeof key === "boolean") return { bool: key };
  if (typeof key === "bigint") return { int: key.toString() };
  if (typeof key === "number") return { float: bitsOf(key) };
  return key instanceof Uint8Array ? { bytes: hex(key) } : { tuple: key.map(describeKey) };
}

export const describePath = (path) =>
  path.map(({ kind, value }) => [kind, kind === "item" ? describeKey(value) : value]);

function readKey(key) {
  if (typeof key === "string") return key;
  const [[kind, value]] = Object.entries(key);
  if (kind === "int") return BigInt(value);
  if (kind === "float") return Buffer.from(value, "hex").readDoubleLE();
  if (kind === "bytes") return new Uint8Array(Buffer.from(value, "hex"));
  return kind === "tuple" ? value.map(readKey) : value;
}

export const readPath = (path) => path.map(([kind, value]) => new Key(kind, kind === "item" ? readKey(value) : value));

/** Describe a tree; all values are read, and checked where there are digests. */
export async function describeTree(file, tree) {
  if (tree instanceof Leaf) return describeLeaf(file, tree);
  if (tree.kind === "None") return { node: "None" };
  const named = ["dict", "OrderedDict", "PyTreeContainer"].includes(tree.kind);
  const items = [];
  for (const [key, child] of tree.items) {
    const described = await describeTree(file, child);
    items.push(named ? [describeKey(key), described] : described);
  }
  return { node: tree.kind, items };
}

async function describeLeaf(file, leaf) {
  const { kind, name } = leaf;
  if (kind === "str") return { leaf: kind, value: leaf.value };
  if (leaf.value !== undefined) return { leaf: kind, value: pythonHex(leaf.value) };
  await file.check(name);
  const values = await file.values(name);
  if (kind === "bool") return { leaf: kind, value: values[0] === 1 };
  if (kind === "int") return { leaf: kind, value: pythonHex(values[0]) };
  // Booleans are the bytes 0 and 1, whatever byte the file has for true.
  const bits = hex(leaf.dtype === "bool" ? values : await file.bytes(name));
  if (kind === "float" || kind === "complex") return { leaf: kind, bits };
  if (kind === "key") return { leaf: kind, impl: leaf.impl, shape: file.keyShape(leaf), bits };
  const found = { leaf: kind, dtype: leaf.dtype, shape: leaf.shape, bits };
  return leaf.weak ? { ...found, weak: true } : found;
}
