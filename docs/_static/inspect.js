/** The page "Look inside a file": opens files in the browser, and shows what inspect_model.js tells of them. */

import {
  countOf, describe, describeStatistics, formatCount, formatElement, formatSize, grouped, openFiles, openFirst, parts,
  plural, rawAddress, rowsOf, shorten, statistics, visible,
} from "./inspect_model.js";
import { Leaf, openUrl } from "./pytree2safetensors.js";

const STATISTICS = { local: 2 ** 24, remote: 2 ** 20 }; // bytes that are read without being asked for
const SHOWN = 10; // rows and columns of values
const MOST = 100_000; // characters of one text
const ENTRIES = 300; // of the metadata

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
    const isDrawn = first <= this.active && this.active < last;
    this.element.setAttribute("aria-activedescendant", isDrawn ? `row-${this.active}` : "");
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
    else if (event.key === "ArrowLeft") this.active = row.alone ? this.active : this.rows.indexOf(row.parent);
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

// --- Values -------------------------------------------------------------------------------------------

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

/** Fill the panel of a leaf. */
async function showLeaf(panel, file, row, remote) {
  const leaf = Object.assign(row.content, { count: row.count });
  const token = (panel.token = {});
  const isCurrent = () => panel.token === token && panel.isConnected; // no other leaf or file was opened
  const tensor = file.tensors.get(leaf.name);
  const pairs = [["type", describe(leaf)]];
  if (tensor) {
    pairs.push(["stored as", `${tensor.dtype}[${tensor.shape}], ${plural(row.bytes, "byte")}`]);
    const place = `bytes ${grouped.format(tensor.start)} to ${grouped.format(tensor.stop)}`;
    pairs.push(["place", `${place} of ${visible(tensor.source.label)}`]);
  }
  const title = make("h3", {}, make("bdi", {}, leaf.name ? visible(shorten(leaf.name, 3000)) : "the root"));
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
    if (isCurrent() && row.bytes <= limit) more.append(...(await checkDigest(file, leaf, isCurrent)));
  } catch (error) {
    if (isCurrent()) more.append(makeError(error));
  }
}

/** Check the digest of a tensor, and tell that it matches; without digests, tell nothing. */
async function checkDigest(file, leaf, isCurrent) {
  return (await file.check(leaf.name, isCurrent)) ? [makeList([["digest", "matches"]])] : [];
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
    try {
      const whole = await statistics(file, leaf, Infinity, isCurrent);
      const digest = await checkDigest(file, leaf, isCurrent);
      if (isCurrent()) box.replaceChildren(makeList(describeStatistics(leaf, whole)), ...digest);
    } catch (error) {
      box.replaceChildren(makeError(error));
    }
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
  const { size } = file.metadata;
  const first = [...file.metadata].slice(0, ENTRIES);
  const entries = first.map(([key, value]) => [visible(shorten(key, 300)), shorten(value, MOST)]);
  if (size > ENTRIES) entries.push(["…", `${grouped.format(size - ENTRIES)} more`]);
  const summary = make("summary", {}, `Metadata: ${plural(size, "entry", "entries")}`);
  const remark = `The names do not form a tree, so they are split at their dots: ${visible(problem?.message ?? "")}`;
  const title = make("h2", { tabindex: "-1" }, make("bdi", {}, visible(label)));
  place.replaceChildren(
    title,
    makeList(totals),
    problem ? make("p", { class: "status" }, remark) : "",
    size ? make("details", {}, summary, makeList(entries)) : "",
    make("div", { class: "search" }, search, status),
    view.element,
    panel,
  );
  view.show(all);
  title.focus(); // a screen reader tells that the file is open
}

/** Open what was dropped: files, or the files of a folder, not those of folders in it. */
async function openDropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const folder = entries.find((entry) => entry.isDirectory);
  if (!folder) return openFiles([...transfer.files], false);
  const reader = folder.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
    if (!some.length) break;
    found.push(...some.filter((entry) => entry.isFile));
  }
  return openFiles(await Promise.all(found.map((entry) => new Promise((done, fail) => entry.file(done, fail)))), true);
}

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
    const files = [...input.files];
    if (!files.length) return;
    const [folder] = files[0].webkitRelativePath.split("/");
    const inside = (file) => file.webkitRelativePath.split("/").length <= 2;
    open(folder || files[0].name, false, () => openFiles(files.filter(inside), Boolean(folder)));
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
    const name = event.dataTransfer.files[0]?.name ?? "what was dropped";
    open(name, false, () => openDropped(event.dataTransfer)); // at once, as the items go with the event
  });
  // The documentation turns its pages with the arrow keys.
  page.addEventListener("keydown", (event) => event.stopPropagation());
  page.replaceChildren(zone, result);
}

start(document.getElementById("inspect"));
