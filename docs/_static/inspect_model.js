/** What the page "Look inside a file" shows of a file, without the elements that show it. */

import {
  Key, Leaf, Node, Pytree2SafetensorsError, blobSource, openFile, openFolder, spellKey,
} from "./pytree2safetensors.js";

const STEP = 2 ** 22; // bytes that are read at once
const DEEPEST = 100; // dots that cut a name

// --- Text -------------------------------------------------------------------------------------------

export const grouped = new Intl.NumberFormat("en");
export const plural = (count, word, many = `${word}s`) => `${grouped.format(count)} ${count === 1 ? word : many}`;

function readable(count, units, base) {
  let power = 0;
  while (count >= base && power < units.length - 1) {
    count /= base;
    power += 1;
  }
  return `${power ? count.toPrecision(3).replace(/e\+3$/, "") : count}${units[power]}`;
}

export const formatSize = (bytes) => readable(bytes, [" B", " kB", " MB", " GB", " TB", " PB"], 999.5);
export const formatCount = (count) => readable(count, ["", " K", " M", " B", " T"], 999.5);

/** Show characters that cannot be seen, or that change the order of others, as escapes. */
export const visible = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu, escape);
const escape = (character) => `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`;

export const shorten = (text, most) => (text.length > most ? `${text.slice(0, most)}…` : text);

// --- The rows of a tree -----------------------------------------------------------------------------

/** A line of the tree: a node, a leaf, or a fold of siblings that are like the one before. */
class Row {
  constructor(label, content, children = []) {
    this.label = label;
    this.content = content; // a Node, a Leaf, or undefined
    this.children = children;
    this.parent = undefined;
    this.folded = false;
    this.open = false;
    this.level = 1;
  }
}

const TOTALS = ["bytes", "count"];

export const countOf = (shape) => shape.reduce((product, size) => product * Number(size), 1);
const isText = (key) => typeof key === "string";

/** The label of a child: its index or name, or its dict key as Python writes it. */
function labelOf(key, { kind }) {
  if (isText(key)) return key === "" ? '""' : visible(shorten(key, 300));
  if (kind !== "dict" && kind !== "OrderedDict") return String(key);
  const spelled = spellKey(new Key("item", key)).slice(3, -1); // between @\( and )
  return shorten(spelled.replace(/\\(.)/gs, "$1"), 300);
}

/** Make the rows of an open file: from its tree, or from the dots in its names. */
export function rowsOf(file) {
  let tree;
  let problem;
  try {
    tree = file.tree();
  } catch (error) {
    if (!(error instanceof Pytree2SafetensorsError)) throw error;
    problem = error;
    tree = cutAtDots(file);
  }
  const root = rowOf(file, tree, "(root)");
  summarize(root, new Map());
  return { root, problem };
}

function rowOf(file, content, label, level = 1) {
  if (content instanceof Leaf) {
    const row = new Row(label, content);
    const tensor = file.tensors.get(content.name);
    row.bytes = tensor ? tensor.stop - tensor.start : 0;
    row.count = tensor && content.kind !== "key" ? countOf(content.shape) : 0;
    row.level = level;
    return row;
  }
  const fixed = content.kind === "OrderedDict" || content.items.every(([key]) => !isText(key));
  const items = fixed ? content.items : inNaturalOrder(content.items);
  const row = new Row(label, content);
  row.level = level;
  row.children = items.map(([key, child]) => rowOf(file, child, labelOf(key, content), level + 1));
  return row;
}

/** Sort names so that layer 10 comes after layer 2. */
function inNaturalOrder(items) {
  const cut = (key) => /^(.*?)(\d{0,15})$/s.exec(isText(key) ? key : "");
  const keyed = items.map((item) => [item, cut(item[0])]);
  keyed.sort(([, a], [, b]) => (a[1] === b[1] ? Number(a[2]) - Number(b[2]) : a[1] < b[1] ? -1 : 1));
  return keyed.map(([item]) => item);
}

/** Split names at their dots, for names that do not form a tree. A name may be both a leaf and a node here. */
function cutAtDots(file) {
  const root = { children: new Map() };
  for (const [name, leaf] of file.leaves) {
    let place = root;
    const names = name.split(".", DEEPEST);
    const { length } = names.join(".");
    if (length < name.length) names.push(name.slice(length + 1));
    for (const part of names) {
      if (!place.children.has(part)) place.children.set(part, { children: new Map() });
      place = place.children.get(part);
    }
    place.leaf = leaf;
  }
  const finish = (place) => {
    const items = [...place.children].map(([part, child]) => [part, finish(child)]);
    if (!place.leaf) return new Node("names", items);
    return items.length ? new Node("names", [["", place.leaf], ...items]) : place.leaf;
  };
  return finish(root);
}

/** Add the totals of each node, and fold siblings that are alike. */
function summarize(row, known) {
  for (const child of row.children) summarize(child, known);
  const { content } = row;
  if (content instanceof Node) {
    for (const total of TOTALS) row[total] = row.children.reduce((sum, child) => sum + child[total], 0);
  }
  const look = content instanceof Leaf
    ? describe(content)
    : `${content.kind}{${row.children.map((child) => `${JSON.stringify(child.label)}:${child.look}`)}}`;
  if (!known.has(look)) known.set(look, known.size);
  row.look = known.get(look);
  row.children = fold(row);
  adopt(row);
}

function adopt(row) {
  row.children.forEach((child, i) => Object.assign(child, { parent: row, position: i + 1 }));
}

const numberless = (label) => label.replace(/\d+/g, "#");

function fold(row) {
  const found = [];
  for (let start = 0; start < row.children.length; ) {
    const first = row.children[start];
    const least = first.content instanceof Leaf ? 20 : 3;
    const pattern = numberless(first.label);
    let stop = start + 1;
    const isAlike = (other) => other && other.look === first.look && numberless(other.label) === pattern;
    if (pattern !== first.label) while (isAlike(row.children[stop])) stop++;
    found.push(first);
    if (stop - start >= least) found.push(foldOf(row.children.slice(start + 1, stop), first));
    else found.push(...row.children.slice(start + 1, stop));
    start = stop;
  }
  return found;
}

function foldOf(rows, first) {
  const range = `${rows[0].label} … ${rows.at(-1).label}`;
  const row = new Row(`${range}: ${grouped.format(rows.length)} more like ${first.label}`, undefined, rows);
  for (const total of TOTALS) row[total] = rows.length * first[total];
  row.folded = true;
  row.level = first.level;
  const deepen = (child) => {
    child.level += 1;
    child.children.forEach(deepen);
  };
  rows.forEach(deepen);
  adopt(row);
  return row;
}

/** Describe a leaf or a node in few words, as `float32[2,3]`. */
export function describe(content) {
  if (content instanceof Node) {
    if (content.kind === "None") return "None";
    return content.items.length ? `${content.kind}, ${grouped.format(content.items.length)}` : `empty ${content.kind}`;
  }
  const { kind, dtype, shape, weak, impl, value } = content;
  if (kind === "str") return `str ${visible(JSON.stringify(value.slice(0, 60)))}`;
  if (kind !== "array" && kind !== "key") return kind;
  if (kind === "key") return `key<${visible(shorten(impl, 60))}>[${shape.slice(0, -1)}]`;
  return `${weak ? "weak " : ""}${dtype ?? "packed"}[${shape}]`;
}

/** Open the first levels of a tree, as far as they are short. */
export function openFirst(root) {
  let budget = 40;
  for (let level = [root]; level.length && budget > 0; ) {
    let next = [];
    for (const row of level) {
      const { length } = row.children;
      if (!length || row.folded || (length > budget && row !== root)) continue;
      row.open = true;
      budget -= length;
      next = next.concat(row.children);
    }
    level = next;
  }
}

// --- Values -------------------------------------------------------------------------------------------

export const parts = (leaf) => (leaf.dtype.startsWith("complex") ? 2 : 1);

/** Write a number. A rounded one does not look like an integer. */
export function formatValue(value) {
  if (typeof value === "bigint" || Number.isInteger(value)) return Object.is(value, -0) ? "-0" : String(value);
  if (!Number.isFinite(value)) return String(value).replace("Infinity", "inf");
  const text = Math.abs(value) < 1e4 ? value.toPrecision(6) : value.toFixed(1);
  return Number.isInteger(Number(text)) ? text : String(Number(text));
}

export function formatElement(leaf, values, i) {
  if (leaf.dtype === "bool") return values[i] ? "True" : "False";
  if (parts(leaf) === 1) return formatValue(values[i]);
  const imaginary = formatValue(values[2 * i + 1]);
  return `${formatValue(values[2 * i])}${imaginary.startsWith("-") ? "" : "+"}${imaginary}j`;
}

/** Go through values a step at a time; undefined if `isCurrent` says that nobody waits any more. */
export async function statistics(file, leaf, limit, isCurrent) {
  const tensor = file.tensors.get(leaf.name);
  const width = (tensor.stop - tensor.start) / Math.max(1, leaf.count);
  const found = { count: 0, zeros: 0, nan: 0, infinite: 0, finite: 0 };
  Object.assign(found, { least: Infinity, most: -Infinity, mean: 0, squares: 0 });
  const stop = Math.min(leaf.count, Math.ceil(limit / width));
  for (let at = 0; at < stop; at += Math.ceil(STEP / width)) {
    const values = await file.values(leaf.name, at, Math.min(stop, at + Math.ceil(STEP / width)));
    if (!isCurrent()) return undefined;
    for (let i = 0; i < values.length; i++) add(found, values[i]);
    found.count += values.length / parts(leaf);
  }
  return found;
}

function add(found, exact) {
  const value = Number(exact);
  if (value === 0) found.zeros++;
  if (Number.isNaN(value)) found.nan++;
  else if (!Number.isFinite(value)) found.infinite++;
  if (!Number.isFinite(value)) return;
  if (exact < found.least) found.least = exact;
  if (exact > found.most) found.most = exact;
  found.finite++;
  const change = value - found.mean;
  found.mean += change / found.finite;
  found.squares += change * (value - found.mean);
}

export function describeStatistics(leaf, found) {
  const pairs = [];
  if (found.finite) {
    const deviation = Math.sqrt(found.squares / found.finite);
    pairs.push(["min", formatValue(found.least)], ["max", formatValue(found.most)]);
    const named = { mean: found.mean, std: deviation };
    for (const [name, value] of Object.entries(named)) {
      pairs.push([name, Number.isFinite(value) ? formatValue(value) : "beyond the range of float64"]);
    }
  }
  pairs.push(["zeros", grouped.format(found.zeros)]);
  if (found.nan) pairs.push(["NaN", grouped.format(found.nan)]);
  if (found.infinite) pairs.push(["infinite", grouped.format(found.infinite)]);
  const which = found.count === leaf.count ? "all" : `the first ${grouped.format(found.count)} of`;
  const what = parts(leaf) === 2 ? " (real and imaginary parts)" : "";
  return [["statistics of", `${which} ${grouped.format(leaf.count)} values${what}`], ...pairs];
}

// --- Opening ----------------------------------------------------------------------------------------

/** Take what was dropped or chosen: one file, or the files of a folder. */
export async function openFiles(files, isFolder) {
  if (!isFolder && files.length === 1 && !files[0].name.endsWith(".json")) return openFile(blobSource(files[0]));
  return openFolder(files.map((file) => [file.name, blobSource(file)]));
}

const PAGE = /^(https:\/\/huggingface\.co\/(?:datasets\/|spaces\/)?[^/]+(?:\/[^/]+)?)\/blob\//;

/** The address of a file on the Hub, from that of its page. */
export const rawAddress = (address) => address.replace(PAGE, "$1/resolve/");
