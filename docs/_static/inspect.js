/** The page "Look inside a file": opens files in the browser, and shows their trees, values and metadata. */

import {
  Key, Leaf, Node, Pytree2SafetensorsError, blobSource, openFile, openFolder, openUrl, spellKey,
} from "./pytree2safetensors.js";

const STATISTICS = { local: 2 ** 24, remote: 2 ** 20 }; // bytes that are read without being asked for
const STEP = 2 ** 22; // bytes that are read at once
const SHOWN = 10; // rows and columns of values
const MOST = 100_000; // characters of one text
const DEEPEST = 100; // dots that cut a name

// --- Text -------------------------------------------------------------------------------------------

const grouped = new Intl.NumberFormat("en");
const plural = (count, word, many = `${word}s`) => `${grouped.format(count)} ${count === 1 ? word : many}`;

function readable(count, units, base) {
  let power = 0;
  while (count >= base && power < units.length - 1) {
    count /= base;
    power += 1;
  }
  return `${power ? count.toPrecision(3).replace(/e\+3$/, "") : count}${units[power]}`;
}

const formatSize = (bytes) => readable(bytes, [" B", " kB", " MB", " GB", " TB", " PB"], 999.5);
const formatCount = (count) => readable(count, ["", " K", " M", " B", " T"], 999.5);

/** Show characters that cannot be seen, or that change the order of others, as escapes. */
const visible = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu, escape);
const escape = (character) => `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`;

const shorten = (text, most) => (text.length > most ? `${text.slice(0, most)}…` : text);

/** Make an element. Text goes in as text, never as markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== undefined));
  return element;
}

function makeList(pairs) {
  return make("dl", {}, ...pairs.flatMap(([term, text]) => [make("dt", {}, term), make("dd", {}, text)]));
}

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

const countOf = (shape) => shape.reduce((product, size) => product * Number(size), 1);
const isText = (key) => typeof key === "string";

/** The label of a child: its index or name, or its dict key as Python writes it. */
function labelOf(key, { kind }) {
  if (isText(key)) return key === "" ? '""' : visible(shorten(key, 300));
  if (kind !== "dict" && kind !== "OrderedDict") return String(key);
  const spelled = spellKey(new Key("item", key)).slice(3, -1); // between @\( and )
  return shorten(spelled.replace(/\\(.)/gs, "$1"), 300);
}

/** Make the rows of an open file: from its tree, or from the dots in its names. */
function rowsOf(file) {
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
    const names = name.split(".");
    if (names.length > DEEPEST) names.push(names.splice(DEEPEST).join("."));
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
function describe(content) {
  if (content instanceof Node) {
    if (content.kind === "None") return "None";
    return content.items.length ? `${content.kind}, ${grouped.format(content.items.length)}` : `empty ${content.kind}`;
  }
  const { kind, dtype, shape, weak, impl, value } = content;
  if (kind === "str") return `str ${visible(JSON.stringify(value.slice(0, 60)))}`;
  if (kind !== "array" && kind !== "key") return kind;
  if (kind === "key") return `key<${visible(impl)}>[${shape.slice(0, -1)}]`;
  return `${weak ? "weak " : ""}${dtype ?? "packed"}[${shape}]`;
}

// --- The tree -----------------------------------------------------------------------------------------

/** A tree of which only the rows in sight are elements. */
class TreeView {
  constructor(onSelect) {
    this.onSelect = onSelect;
    this.space = make("div", { role: "presentation" });
    this.element = make(
      "div",
      {
        class: "tree", role: "tree", tabindex: "0", "aria-label": "the contents of the file",
        onscroll: () => this.draw(), onkeydown: (event) => this.press(event), onclick: (event) => this.click(event),
      },
      this.space,
    );
    new ResizeObserver(() => this.draw()).observe(this.element);
    this.show([]);
  }

  /** Show rows, and those below the open ones. */
  show(rows) {
    this.rows = rows;
    this.active = 0;
    this.selected = undefined;
    this.element.scrollTop = 0;
    this.draw();
  }

  get rowHeight() {
    return this.space.offsetHeight / this.rows.length || 1;
  }

  draw() {
    this.space.style.height = `calc(${this.rows.length} * var(--row))`;
    const height = this.rowHeight;
    const { scrollTop, clientHeight } = this.element;
    const first = Math.max(0, Math.floor(scrollTop / height) - 5);
    const last = Math.min(this.rows.length, Math.ceil((scrollTop + clientHeight) / height) + 5);
    const drawn = [];
    for (let i = first; i < last; i++) drawn.push(this.drawRow(i));
    this.space.replaceChildren(...drawn);
    this.element.setAttribute("aria-activedescendant", this.rows.length ? `row-${this.active}` : "");
  }

  drawRow(index) {
    const row = this.rows[index];
    const siblings = row.alone ? undefined : row.parent?.children;
    const level = row.alone ? 1 : row.level;
    const opens = row.children.length > 0;
    const arrow = make("span", { class: "arrow", "aria-hidden": "true" }, opens ? (row.open ? "▾" : "▸") : "");
    return make(
      "div",
      {
        class: `row${row.folded ? " folded" : ""}${index === this.active ? " active" : ""}`,
        style: `top: calc(${index} * var(--row)); padding-left: ${1.1 * Math.min(level, 12) - 0.7}em`,
        role: "treeitem", id: `row-${index}`, "data-index": index,
        "aria-level": level,
        "aria-setsize": siblings ? siblings.length : this.rows.length,
        "aria-posinset": siblings ? row.position : index + 1,
        "aria-expanded": opens ? String(row.open) : undefined,
        "aria-selected": String(row === this.selected),
        title: row.alone ?? row.label,
      },
      make("span", { class: "name" }, arrow, make("bdi", {}, row.alone ?? row.label)),
      make("span", { class: "kind" }, make("bdi", {}, row.content ? describe(row.content) : "")),
      make("span", { class: "count", title: "parameters" }, row.count ? formatCount(row.count) : ""),
      make("span", { class: "size" }, row.bytes ? formatSize(row.bytes) : ""),
    );
  }

  /** The rows below a row that are in sight. */
  below(row) {
    const found = [];
    const add = (child) => {
      found.push(child);
      if (child.open) child.children.forEach(add);
    };
    row.children.forEach(add);
    return found;
  }

  toggle(index, open = !this.rows[index].open) {
    const row = this.rows[index];
    if (open === row.open || !row.children.length) return;
    const count = row.open ? this.below(row).length : 0;
    row.open = open;
    const added = row.open ? this.below(row) : [];
    this.rows = [...this.rows.slice(0, index + 1), ...added, ...this.rows.slice(index + 1 + count)];
  }

  click(event) {
    const element = event.target.closest(".row");
    if (!element) return;
    this.active = Number(element.dataset.index);
    this.choose(this.active);
  }

  choose(index) {
    const row = this.rows[index];
    if (!row) return;
    if (row.children.length) this.toggle(index);
    else if (row.content instanceof Leaf) this.onSelect((this.selected = row));
    this.draw();
  }

  press(event) {
    const row = this.rows[this.active];
    if (!row || event.altKey || event.ctrlKey || event.metaKey) return;
    const page = Math.max(1, Math.floor(this.element.clientHeight / this.rowHeight) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key in moves) this.active += moves[event.key];
    else if (event.key === "ArrowRight" && row.open) this.active += 1;
    else if (event.key === "ArrowRight") this.toggle(this.active, true);
    else if (event.key === "ArrowLeft" && row.open) this.toggle(this.active, false);
    else if (event.key === "ArrowLeft") this.active = Math.max(0, this.rows.indexOf(row.parent));
    else if (event.key === "Enter" || event.key === " ") this.choose(this.active);
    else return;
    event.preventDefault();
    this.active = Math.max(0, Math.min(this.rows.length - 1, this.active));
    this.reveal();
    this.draw();
  }

  /** Scroll as far as the active row takes. */
  reveal() {
    const [top, height] = [this.active * this.rowHeight, this.rowHeight];
    const { scrollTop, clientHeight } = this.element;
    if (top < scrollTop) this.element.scrollTop = top;
    else if (top + height > scrollTop + clientHeight) this.element.scrollTop = top + height - clientHeight;
  }
}

/** Open the first levels of a tree, as far as they are short. */
function openFirst(root) {
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

const parts = (leaf) => (leaf.dtype.startsWith("complex") ? 2 : 1);

function formatValue(value) {
  if (typeof value === "bigint" || Number.isInteger(value)) return Object.is(value, -0) ? "-0" : String(value);
  return Number.isFinite(value) ? String(Number(value.toPrecision(6))) : String(value).replace("Infinity", "inf");
}

function formatElement(leaf, values, i) {
  if (leaf.dtype === "bool") return values[i] ? "True" : "False";
  if (parts(leaf) === 1) return formatValue(values[i]);
  const imaginary = formatValue(values[2 * i + 1]);
  return `${formatValue(values[2 * i])}${imaginary.startsWith("-") ? "" : "+"}${imaginary}j`;
}

/** Show the first values: a row of them, or the corner of the first matrix. */
async function makeValues(file, leaf) {
  const columns = leaf.shape.at(-1) ?? 1;
  const rows = leaf.shape.at(-2) ?? 1;
  const more = (shown, all) => (shown < all ? [make("td", {}, "…")] : []);
  const lines = [];
  for (let row = 0; row < Math.min(rows, SHOWN); row++) {
    const shown = Math.min(columns, rows === 1 ? 4 * SHOWN : SHOWN);
    const values = await file.values(leaf.name, row * columns, row * columns + shown);
    for (let start = 0; start < shown; start += SHOWN) {
      const length = Math.min(SHOWN, shown - start);
      const cells = Array.from({ length }, (_, i) => make("td", {}, formatElement(leaf, values, start + i)));
      lines.push(make("tr", {}, ...cells, ...more(start + length, columns)));
    }
  }
  if (rows > SHOWN) lines.push(make("tr", {}, make("td", {}, "⋮")));
  const table = make("table", { "aria-label": "the first values" }, make("tbody", {}, ...lines));
  return make("div", { class: "values", tabindex: "0", role: "region", "aria-label": "the first values" }, table);
}

/** Go through values a step at a time; undefined if `isCurrent` says that nobody waits any more. */
async function statistics(file, leaf, limit, isCurrent) {
  const tensor = file.tensors.get(leaf.name);
  const width = (tensor.stop - tensor.start) / Math.max(1, leaf.count);
  const found = { count: 0, zeros: 0, nan: 0, infinite: 0, finite: 0 };
  Object.assign(found, { least: Infinity, most: -Infinity, mean: 0, squares: 0 });
  const stop = Math.min(leaf.count, Math.ceil(limit / width));
  for (let at = 0; at < stop; at += Math.ceil(STEP / width)) {
    const values = await file.values(leaf.name, at, Math.min(stop, at + Math.ceil(STEP / width)));
    if (!isCurrent()) return undefined;
    for (let i = 0; i < values.length; i++) add(found, Number(values[i]));
    found.count += values.length / parts(leaf);
  }
  return found;
}

function add(found, value) {
  if (value === 0) found.zeros++;
  if (Number.isNaN(value)) found.nan++;
  else if (!Number.isFinite(value)) found.infinite++;
  if (!Number.isFinite(value)) return;
  if (value < found.least) found.least = value;
  if (value > found.most) found.most = value;
  found.finite++;
  const change = value - found.mean;
  found.mean += change / found.finite;
  found.squares += change * (value - found.mean);
}

function describeStatistics(leaf, found) {
  const pairs = [];
  if (found.finite) {
    const deviation = Math.sqrt(found.squares / found.finite);
    const named = { min: found.least, max: found.most, mean: found.mean, std: deviation };
    for (const [name, value] of Object.entries(named)) pairs.push([name, formatValue(value)]);
  }
  pairs.push(["zeros", grouped.format(found.zeros)]);
  if (found.nan) pairs.push(["NaN", grouped.format(found.nan)]);
  if (found.infinite) pairs.push(["infinite", grouped.format(found.infinite)]);
  const which = found.count === leaf.count ? "all" : `the first ${grouped.format(found.count)} of`;
  const what = parts(leaf) === 2 ? " (real and imaginary parts)" : "";
  return [["statistics of", `${which} ${grouped.format(leaf.count)} values${what}`], ...pairs];
}

/** Fill the panel of a leaf. */
async function showLeaf(panel, file, row, remote) {
  const leaf = Object.assign(row.content, { count: row.count });
  const token = (panel.token = {});
  const isCurrent = () => panel.token === token;
  const tensor = file.tensors.get(leaf.name);
  const pairs = [["type", describe(leaf)]];
  if (tensor) {
    pairs.push(["stored as", `${tensor.dtype}[${tensor.shape}], ${plural(row.bytes, "byte")}`]);
    const place = `bytes ${grouped.format(tensor.start)} to ${grouped.format(tensor.stop)}`;
    pairs.push(["place", `${place} of ${visible(tensor.source.label)}`]);
  }
  const title = make("h3", {}, make("bdi", {}, leaf.name ? visible(leaf.name) : "the root"));
  const more = make("div", { "aria-live": "polite" });
  panel.replaceChildren(title, makeList(pairs), more);
  panel.hidden = false;
  panel.scrollIntoView({ block: "nearest" });
  try {
    if (!tensor) {
      // Decimal digits of a very large integer take their time.
      const isHuge = typeof leaf.value === "bigint" && BigInt.asIntN(4096, leaf.value) !== leaf.value;
      const text = isHuge ? `in hexadecimal: ${leaf.value.toString(16)}` : String(leaf.value);
      more.append(make("pre", { class: "text" }, make("bdi", {}, shorten(text, MOST))));
      return;
    }
    if (!row.bytes) return;
    if (leaf.kind === "key") leaf.count = countOf(leaf.shape);
    const values = await makeValues(file, leaf);
    if (isCurrent()) more.append(values);
    const limit = STATISTICS[remote ? "remote" : "local"];
    if (leaf.count > 1) await showStatistics(more, file, leaf, limit, isCurrent);
    if (isCurrent() && file.digests && row.bytes <= limit) {
      await file.check(leaf.name);
      if (isCurrent()) more.append(makeList([["digest", "matches"]]));
    }
  } catch (error) {
    if (isCurrent()) more.append(makeError(error));
  }
}

async function showStatistics(place, file, leaf, limit, isCurrent) {
  const found = await statistics(file, leaf, limit, isCurrent);
  if (!found || !isCurrent()) return;
  const box = make("div", {}, makeList(describeStatistics(leaf, found)));
  place.append(box);
  if (found.count === leaf.count) return;
  const { start, stop } = file.tensors.get(leaf.name);
  const readAll = async () => {
    box.replaceChildren(make("p", { class: "status" }, "reading …"));
    const whole = await statistics(file, leaf, Infinity, isCurrent).catch(makeError);
    if (whole) box.replaceChildren(whole instanceof Element ? whole : makeList(describeStatistics(leaf, whole)));
  };
  box.append(make("button", { type: "button", onclick: readAll }, `Read all ${formatSize(stop - start)}`));
}

// --- Opening --------------------------------------------------------------------------------------------

function makeError(error) {
  // What `fetch` throws says no more, so that pages learn nothing of other servers.
  const hidden = error instanceof TypeError && /fetch|network|load/i.test(error.message);
  const reason = "cannot read this URL: it does not exist, or its server does not allow other pages to read it";
  return make("div", { class: "error", role: "alert" }, visible(hidden ? reason : error.message));
}

/** Show what is open: totals, metadata, search and tree. */
function showFile(place, file, label, remote) {
  const { root, problem } = rowsOf(file);
  openFirst(root);
  const panel = make("section", { class: "leaf", hidden: true, "aria-label": "the chosen leaf" });
  const view = new TreeView((row) => showLeaf(panel, file, row, remote));
  const all = [root, ...view.below(root)];
  const dtypes = new Map();
  for (const { dtype, start, stop } of file.tensors.values()) {
    dtypes.set(dtype, (dtypes.get(dtype) ?? 0) + stop - start);
  }
  const sorted = [...dtypes].sort(([, a], [, b]) => b - a);
  const sizes = sorted.map(([dtype, bytes]) => (sorted.length > 1 ? `${dtype} (${formatSize(bytes)})` : dtype));
  const totals = [
    ["size", `${formatSize(root.bytes)} in ${plural(file.tensors.size, "tensor")}`],
    ["parameters", grouped.format(root.count)],
    ["dtypes", sizes.join(", ") || "none"],
  ];
  const shards = new Set(Array.from(file.tensors.values(), (tensor) => tensor.source.label));
  if (shards.size > 1) totals.push(["shards", grouped.format(shards.size)]);
  if (file.digests) totals.push(["digests", "for each tensor"]);
  const status = make("span", { class: "status", role: "status" });
  const search = make("input", {
    type: "search", placeholder: "Search by name", "aria-label": "search by name",
    oninput: () => find(search.value),
    onkeydown: (event) => event.key === "Enter" && view.element.focus(),
  });
  const names = [...file.leaves.keys()];
  const leaves = new Map();
  const collect = (row) => {
    if (row.content instanceof Leaf) leaves.set(row.content.name, row);
    row.children.forEach(collect);
  };
  const find = (text) => {
    const wanted = text.toLowerCase();
    if (!leaves.size) collect(root);
    for (const row of leaves.values()) row.alone = undefined;
    if (!wanted) {
      status.textContent = "";
      return view.show([root, ...view.below(root)]);
    }
    const found = names.filter((name) => name.toLowerCase().includes(wanted));
    status.textContent = `${grouped.format(found.length)} of ${plural(names.length, "leaf", "leaves")}`;
    const shown = (name) => Object.assign(leaves.get(name), { alone: visible(shorten(name, 300)) || '""' });
    return view.show(found.map(shown));
  };
  const entries = [...file.metadata].map(([key, value]) => [visible(shorten(key, 300)), shorten(value, MOST)]);
  const summary = make("summary", {}, `Metadata: ${plural(entries.length, "entry", "entries")}`);
  const remark = `The names do not form a tree, so they are split at their dots: ${visible(problem?.message ?? "")}`;
  const title = make("h2", { tabindex: "-1" }, make("bdi", {}, visible(label)));
  place.replaceChildren(
    title,
    makeList(totals),
    problem ? make("p", { class: "status" }, remark) : "",
    entries.length ? make("details", {}, summary, makeList(entries)) : "",
    make("div", { class: "search" }, search, status),
    view.element,
    panel,
  );
  view.show(all);
  title.focus(); // a screen reader tells that the file is open
}

/** Take what was dropped or chosen: one file, or the files of a folder. */
async function openFiles(files) {
  if (files.length === 1 && !files[0].name.endsWith(".json")) return openFile(blobSource(files[0]));
  return openFolder(files.map((file) => [file.name, blobSource(file)]));
}

/** List the files of a dropped folder, not those of folders in it. */
async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const folder = entries.find((entry) => entry.isDirectory);
  if (!folder) return [...transfer.files];
  const reader = folder.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) break;
    found.push(...some.filter((entry) => entry.isFile));
  }
  return Promise.all(found.map((entry) => new Promise((done, fail) => entry.file(done, fail))));
}

/** The address of a file on the Hub, from that of its page. */
const rawAddress = (address) => address.replace(/^(https:\/\/huggingface\.co\/.+)\/blob\//, "$1/resolve/");

function start(page) {
  const result = make("div");
  let latest;
  /** Open something and show it, or say why not; of several, the last counts. */
  const open = async (label, remote, opening) => {
    const mine = (latest = {});
    result.replaceChildren(make("p", { class: "status", role: "status" }, `opening ${visible(label)} …`));
    try {
      const file = await opening();
      if (latest === mine) showFile(result, file, label, remote);
    } catch (error) {
      if (latest === mine) result.replaceChildren(makeError(error));
    }
  };
  const choose = (input) => {
    const inside = (file) => file.webkitRelativePath.split("/").length <= 2;
    const files = [...input.files].filter(inside);
    if (!files.length) return;
    const label = files[0].webkitRelativePath.split("/")[0] || files[0].name;
    open(label, false, () => openFiles(files));
    input.value = "";
  };
  const makeInput = (option) => {
    const input = make("input", { type: "file", hidden: true, [option]: true, onchange: () => choose(input) });
    return input;
  };
  const [fileInput, folderInput] = [makeInput("multiple"), makeInput("webkitdirectory")];
  const address = make("input", { type: "url", required: true, placeholder: "https://…", "aria-label": "URL" });
  const submit = (event) => {
    event.preventDefault();
    const url = rawAddress(address.value);
    open(new URL(url).pathname.split("/").at(-1) || url, true, () => openUrl(url));
  };
  const zone = make(
    "div",
    { class: "drop" },
    make("p", {}, "Drop a .safetensors file here, or a folder with an index"),
    make(
      "div",
      { class: "buttons" },
      make("button", { type: "button", onclick: () => fileInput.click() }, "Choose a file"),
      make("button", { type: "button", onclick: () => folderInput.click() }, "Choose a folder"),
    ),
    fileInput,
    folderInput,
    make("form", { onsubmit: submit }, address, make("button", {}, "Open the URL")),
  );
  const mark = (over) => (event) => {
    if (!event.dataTransfer.types.includes("Files")) return false; // such as text for the input
    event.preventDefault();
    zone.classList.toggle("over", over);
    return true;
  };
  // Anywhere on the page: a browser would leave it for a file that is dropped beside the zone.
  document.addEventListener("dragover", mark(true));
  document.addEventListener("dragleave", mark(false));
  document.addEventListener("drop", (event) => {
    if (!mark(false)(event)) return;
    const dropped = filesOf(event.dataTransfer); // now, as the items go with the event
    const name = event.dataTransfer.files[0]?.name ?? "what was dropped";
    open(name, false, async () => openFiles(await dropped));
  });
  // The documentation turns its pages with the arrow keys.
  page.addEventListener("keydown", (event) => event.stopPropagation());
  page.replaceChildren(zone, result);
}

start(document.getElementById("inspect"));
