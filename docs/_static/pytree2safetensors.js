/**
 * Read safetensors files and pytrees in JavaScript, in browsers and in Node 20 or later.
 *
 * An ES module without dependencies. It implements what docs/format.md asks of a reader, and follows its sections.
 * Values of Python map to JavaScript: `None` to null, an int to a BigInt, a float to a number, bytes to a Uint8Array,
 * a tuple to an array.
 */

/** The base class of the errors of this module. */
export class Pytree2SafetensorsError extends Error {
  get name() {
    return this.constructor.name;
  }
}
/** A string that spells no key path, or a key path without a spelling. */
export class KeyPathError extends Pytree2SafetensorsError {}
/** Names that make no tree. */
export class TreeStructureError extends Pytree2SafetensorsError {}
/** A file that breaks the format. */
export class FileFormatError extends Pytree2SafetensorsError {}

const MAX_HEADER = 100_000_000;
const MAX_DIMENSIONS = 64;
const MAX_INDEX = 2 ** 31 - 1;
const MAX_GAPS = 2 ** 20;
const MAX_DEPTH = 1000; // of nodes in a tree, and of values in JSON
const BLOCK = 16 * 2 ** 20; // bytes that one SHA-256 covers
const AT_ONCE = 24; // shards whose headers are read
const NOTE = "pytree2safetensors";
const DIGESTS = "pytree2safetensors.sha256";
const METADATA_DIGEST = "pytree2safetensors.sha256.metadata";
const SURROGATE = /\p{Surrogate}/u; // with the flag u, a lone one

const show = (text) => JSON.stringify(text.length > 200 ? `${text.slice(0, 200)}...` : text);
const isReserved = (key) => key === NOTE || key.startsWith(`${NOTE}.`);

/** Compare strings by code points; JavaScript's own operators compare UTF-16 units. */
export function compareText(a, b) {
  const length = Math.min(a.length, b.length);
  for (let i = 0; i < length; i++) {
    const [x, y] = [a.charCodeAt(i), b.charCodeAt(i)];
    if (x !== y) return x >= 0xd800 && y >= 0xd800 ? a.codePointAt(i) - b.codePointAt(i) || x - y : x - y;
  }
  return a.length - b.length;
}

// --- Key paths -----------------------------------------------------------------------------------

/** A key: the kind "attr", "item", "index" or "flat" (a child without keys), and its name, dict key or index. */
export class Key {
  constructor(kind, value) {
    this.kind = kind;
    this.value = value;
  }
}

const MARKERS = { attr: ".", item: "@", index: "#", flat: "#\\(" };

/** Spell a key path: an array of keys. */
export function spellKeyPath(path) {
  return joinSegments(path.map(spellKey));
}

/** Spell one key as a segment, marker included. */
export function spellKey({ kind, value }) {
  if (kind === "item" && typeof value !== "string") return `@\\(${escapeText(spellLiteral(value))})`;
  if (kind === "attr" || kind === "item") return MARKERS[kind] + escapeText(value);
  if (!Number.isInteger(value) || value < 0 || value > MAX_INDEX) {
    throw new KeyPathError(`an index is a number from 0 to ${MAX_INDEX}, not ${value}`);
  }
  return kind === "index" ? `#${value}` : `#\\(${value})`;
}

function joinSegments(segments) {
  const text = segments.join("");
  // The dot of a first attribute stays if its name is empty or reserved.
  return /^\.(?!$|[.@#]|__metadata__(?:$|[.@#]))/.test(text) ? text.slice(1) : text;
}

function escapeText(text) {
  if (typeof text !== "string") throw new KeyPathError(`a name is a string, not ${typeof text}`);
  if (SURROGATE.test(text)) throw new KeyPathError(`the lone surrogate in ${show(text)} has no UTF-8 spelling`);
  return text.replace(/[.@#\\]/g, "\\$&");
}

/** Read a spelled key path: the inverse of `spellKeyPath`. */
export function parseKeyPath(string) {
  return splitKeyPath(string).map(readSegment);
}

/** Cut a spelled key path into segments, each with its marker. */
function splitKeyPath(string) {
  const refuse = (reason) => {
    throw new KeyPathError(`${show(string)} spells no key path: ${reason}`);
  };
  if (SURROGATE.test(string)) refuse("a lone surrogate has no UTF-8 spelling");
  const segments = [];
  let start = 0;
  for (let i = 0; i < string.length; i++) {
    const character = string[i];
    if (character === "\\") {
      const opens = string[i + 1] === "(" && i === start + 1 && "@#".includes(string[start]);
      if (!opens && !".@#\\".includes(string[i + 1] ?? " ")) refuse(`the backslash at position ${i} escapes nothing`);
      i++;
    } else if (i > start && (character === "." || character === "@" || character === "#")) {
      segments.push(string.slice(start, i));
      start = i;
    }
  }
  if (string) segments.push(string.slice(start));
  const first = segments[0] ?? "@";
  if (first === "__metadata__") refuse("this name is reserved by the file format");
  if (first[0] === "." && first !== "." && first !== ".__metadata__") refuse("a leading name stands without its '.'");
  if (!".@#".includes(first[0])) segments[0] = `.${first}`;
  return segments;
}

function readSegment(segment) {
  const isWrapped = segment.startsWith("\\(", 1);
  const text = segment.slice(isWrapped ? 3 : 1, isWrapped ? -1 : undefined).replace(/\\(.)/gsu, "$1");
  const key =
    segment[0] === "#"
      ? new Key(isWrapped ? "flat" : "index", Number(text))
      : new Key(segment[0] === "@" ? "item" : "attr", isWrapped ? readLiteral(text) : text);
  const spelling = spellKey(key);
  if (spelling !== segment) throw new KeyPathError(`${show(segment)} is not a key; the spelling is ${show(spelling)}`);
  return key;
}

// --- Dict keys that are not strings --------------------------------------------------------------

/** Write a dict key as Python's `ascii` does. */
function spellLiteral(value, depth = 0) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "number") return spellFloat(value);
  if (typeof value === "bigint") {
    const digits = value.toString();
    if (digits.replace("-", "").length > 4300) throw new KeyPathError("a dict key is an int of more than 4300 digits");
    return digits;
  }
  if (typeof value === "string") {
    if (SURROGATE.test(value)) throw new KeyPathError("a dict key holds a lone surrogate");
    return quote(Array.from(value, (character) => character.codePointAt(0)));
  }
  if (value instanceof Uint8Array) return `b${quote(value)}`;
  if (!Array.isArray(value)) throw new KeyPathError(`a dict key of type ${typeof value} has no spelling`);
  if (depth === 64) throw new KeyPathError("a dict key nests tuples more than 64 deep");
  const items = value.map((item) => spellLiteral(item, depth + 1));
  return items.length === 1 ? `(${items[0]},)` : `(${items.join(", ")})`;
}

function spellFloat(value) {
  if (!Number.isFinite(value)) throw new KeyPathError(`a dict key is the float ${value}, which is not finite`);
  const sign = value < 0 || Object.is(value, -0) ? "-" : "";
  const [mantissa, power] = Math.abs(value).toExponential().split("e");
  const exponent = Number(power);
  if (exponent >= -4 && exponent < 16) return `${sign}${Math.abs(value)}${Number.isInteger(value) ? ".0" : ""}`;
  return `${sign}${mantissa}e${exponent < 0 ? "-" : "+"}${String(Math.abs(exponent)).padStart(2, "0")}`;
}

const NAMED = { 9: "\\t", 10: "\\n", 13: "\\r", 92: "\\\\" };
const hex = (code, digits) => code.toString(16).padStart(digits, "0");

/** Quote code points or bytes: a byte beyond ASCII and a character up to U+00FF look the same. */
function quote(codes) {
  const mark = codes.includes(39) && !codes.includes(34) ? 34 : 39;
  const pieces = Array.from(codes, (code) => {
    if (NAMED[code]) return NAMED[code];
    if (code >= 32 && code < 127) return (code === mark ? "\\" : "") + String.fromCharCode(code);
    return code < 0x100 ? `\\x${hex(code, 2)}` : code < 0x10000 ? `\\u${hex(code, 4)}` : `\\U${hex(code, 8)}`;
  });
  const around = String.fromCharCode(mark);
  return around + pieces.join("") + around;
}

const ATOM =
  /(None|True|False)|(-?[0-9]+(?:\.[0-9]+)?(?:e[+-][0-9]+)?)|(b?)(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")/y;

/** Read what `spellLiteral` writes, and some more; whoever calls this compares the spelling. */
function readLiteral(text) {
  let at = 0;
  const refuse = () => {
    throw new KeyPathError(`${show(text)} is no dict key`);
  };
  const read = (depth) => {
    if (text[at] === "(") {
      if (depth === 64) refuse();
      const items = [];
      for (at++; text[at] !== ")"; ) {
        items.push(read(depth + 1));
        if (text[at] === ",") at += text[at + 1] === " " ? 2 : 1;
        else if (text[at] !== ")") refuse();
      }
      at++;
      return items;
    }
    ATOM.lastIndex = at;
    const found = ATOM.exec(text) ?? refuse();
    at = ATOM.lastIndex;
    const [, name, number, bytes, single, double] = found;
    if (name) return { None: null, True: true, False: false }[name];
    if (number) return /[.e]/.test(number) ? Number(number) : number.length > 4301 ? refuse() : BigInt(number);
    const codes = [];
    for (const [, x, u, U, simple] of (single ?? double).matchAll(ESCAPE)) {
      const code = x ?? u ?? U;
      const escaped = { "\\n": 10, "\\r": 13, "\\t": 9 }[simple];
      codes.push(code ? parseInt(code, 16) : (escaped ?? simple.codePointAt(simple[0] === "\\" ? 1 : 0)));
    }
    if (bytes) return Uint8Array.from(codes);
    if (codes.some((code) => code > 0x10ffff || (code >= 0xd800 && code < 0xe000))) refuse();
    return codes.map((code) => String.fromCodePoint(code)).join("");
  };
  const value = read(0);
  return at === text.length ? value : refuse();
}

const ESCAPE = /\\x([0-9a-f]{2})|\\u([0-9a-f]{4})|\\U([0-9a-f]{8})|(\\?.)/gsu;

/** Compare two dict keys as Python does; undefined if Python cannot. */
function compareKeys(a, b) {
  if (typeof a === "string" && typeof b === "string") return compareText(a, b);
  if (isNumber(a) && isNumber(b)) return a < b ? -1 : a > b ? 1 : 0; // exact, also for a BigInt and a number
  const isBytes = a instanceof Uint8Array && b instanceof Uint8Array;
  if (!isBytes && !(Array.isArray(a) && Array.isArray(b))) return undefined;
  for (let i = 0; i < a.length && i < b.length; i++) {
    const order = a[i] === null && b[i] === null ? 0 : compareKeys(a[i], b[i]);
    if (order !== 0) return order;
  }
  return a.length - b.length;
}

const isNumber = (value) => typeof value === "number" || typeof value === "bigint" || typeof value === "boolean";

/** A string that is the same for two dict keys if they are equal in Python. */
function identity(value) {
  if (isNumber(value)) return typeof value === "number" && !Number.isInteger(value) ? `${value}` : `${BigInt(value)}`;
  if (typeof value === "string") return JSON.stringify(value);
  if (Array.isArray(value)) return `(${value.map(identity).join()})`;
  return value === null ? "None" : `b[${value.join()}]`;
}

// --- JSON ----------------------------------------------------------------------------------------

/** A JSON number that is not written as an integer, or that has more digits than any integer that counts. */
class Fraction {}

const ATOM_OF_JSON = /true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?/y;

/** Read JSON: objects become Maps, a name twice is an error, integers beyond 2^53 are BigInts. */
function parseJSON(text, what) {
  let at = 0;
  const refuse = (reason = "is not valid JSON") => {
    throw new FileFormatError(`${what} ${reason}, at character ${at}`);
  };
  const space = () => {
    for (let code; (code = text.charCodeAt(at)) === 32 || code === 10 || code === 13 || code === 9; ) at++;
  };
  const take = (mark) => {
    space();
    return text[at] === mark && ++at > 0;
  };
  const string = () => {
    const start = at;
    for (let stop = at; ; ) {
      stop = text.indexOf('"', stop) + 1 || refuse();
      let back = stop - 1;
      while (text[back - 1] === "\\") back--;
      if ((stop - back) % 2) {
        at = stop;
        break;
      }
    }
    const inside = text.slice(start, at - 1);
    try {
      return /[\\\x00-\x1f]/.test(inside) ? JSON.parse(`"${inside}"`) : inside;
    } catch {
      return refuse();
    }
  };
  const items = (close, item) => {
    if (take(close)) return;
    do item();
    while (take(","));
    if (!take(close)) refuse();
  };
  const value = (depth) => {
    if (depth > MAX_DEPTH) refuse("is nested too deep");
    if (take('"')) return string();
    if (take("{")) {
      const found = new Map();
      items("}", () => {
        const name = take('"') ? string() : refuse();
        if (!take(":")) refuse();
        if (found.has(name)) refuse(`has ${show(name)} twice`);
        found.set(name, value(depth + 1));
      });
      return found;
    }
    if (take("[")) {
      const found = [];
      items("]", () => found.push(value(depth + 1)));
      return found;
    }
    ATOM_OF_JSON.lastIndex = at;
    const [word] = ATOM_OF_JSON.exec(text) ?? refuse();
    at = ATOM_OF_JSON.lastIndex;
    if (/^[tfn]/.test(word)) return JSON.parse(word);
    if (/[.eE]/.test(word) || word === "-0") return new Fraction();
    const number = Number(word);
    return Number.isSafeInteger(number) ? number : word.length > 4301 ? new Fraction() : BigInt(word);
  };
  const found = value(0);
  space();
  return at === text.length ? found : refuse();
}

/** Write an array, or a Map of strings with sorted keys, as compact JSON. */
function compactJSON(content) {
  const entry = (key) => `${JSON.stringify(key)}:${JSON.stringify(content.get(key))}`;
  const text = isMap(content) ? `{${[...content.keys()].sort(compareText).map(entry)}}` : JSON.stringify(content);
  return text.replace(/[\x7f-\uffff]/g, (character) => `\\u${hex(character.charCodeAt(0), 4)}`);
}

const isMap = (value) => value instanceof Map;
const isTexts = (value) => isMap(value) && [...value.values()].every((text) => typeof text === "string");

// --- Leaves --------------------------------------------------------------------------------------

/** The bits of one element of each dtype of a file. */
const BITS = {
  BOOL: 8, F4: 4, F6_E2M3: 6, F6_E3M2: 6, U8: 8, I8: 8, F8_E5M2: 8, F8_E4M3: 8, F8_E8M0: 8, F8_E4M3FNUZ: 8,
  F8_E5M2FNUZ: 8, I16: 16, U16: 16, F16: 16, BF16: 16, I32: 32, U32: 32, F32: 32, C64: 64, F64: 64, I64: 64, U64: 64,
};
const NUMPY = {
  BOOL: "bool", U8: "uint8", I8: "int8", U16: "uint16", I16: "int16", F16: "float16", BF16: "bfloat16", U32: "uint32",
  I32: "int32", F32: "float32", C64: "complex64", U64: "uint64", I64: "int64", F64: "float64", F8_E5M2: "float8_e5m2",
  F8_E4M3: "float8_e4m3fn", F8_E8M0: "float8_e8m0fnu", F8_E4M3FNUZ: "float8_e4m3fnuz", F8_E5M2FNUZ: "float8_e5m2fnuz",
};
/** The dtypes that a note names, and the dtypes of their tensors. */
const NOTED = {
  int1: "I8", int2: "I8", int4: "I8", uint1: "U8", uint2: "U8", uint4: "U8", float4_e2m1fn: "U8", float6_e2m3fn: "U8",
  float6_e3m2fn: "U8", float8_e3m4: "U8", float8_e4m3: "U8", float8_e4m3b11fnuz: "U8",
};
const SCALARS = { bool: "BOOL", int: "I64", float: "F64", complex: "F64" };
const STORED = { ...SCALARS, ...NOTED, key: "U32" }; // by kinds of leaves
const WEAK = ["BOOL", "I32", "I64", "F32", "F64", "C64"];
const KEY_WORDS = { threefry2x32: 2, rbg: 4, unsafe_rbg: 4 };

/** Floats: the bits of the exponent and of the mantissa, the bias, and which codes are no numbers. */
const FLOATS = {
  float16: [5, 10, 15, "ieee"], float8_e5m2: [5, 2, 15, "ieee"], float8_e4m3: [4, 3, 7, "ieee"],
  float8_e3m4: [3, 4, 3, "ieee"], float8_e4m3fn: [4, 3, 7, "fn"], float8_e4m3fnuz: [4, 3, 8, "fnuz"],
  float8_e5m2fnuz: [5, 2, 16, "fnuz"], float8_e4m3b11fnuz: [4, 3, 11, "fnuz"], float6_e2m3fn: [2, 3, 1, "finite"],
  float6_e3m2fn: [3, 2, 3, "finite"], float4_e2m1fn: [2, 1, 1, "finite"],
};
const ARRAYS = {
  uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int16: Int16Array, uint32: Uint32Array, int32: Int32Array,
  float32: Float32Array, complex64: Float32Array, uint64: BigUint64Array, int64: BigInt64Array,
  float64: Float64Array, complex128: Float64Array,
};

function decodeFloat(code, [exponentBits, mantissaBits, bias, kind]) {
  const sign = code >> (exponentBits + mantissaBits) ? -1 : 1;
  const exponent = (code >> mantissaBits) & (2 ** exponentBits - 1);
  const mantissa = code & (2 ** mantissaBits - 1);
  const full = exponent === 2 ** exponentBits - 1;
  if (kind === "ieee" && full) return mantissa ? NaN : sign * Infinity;
  if (kind === "fn" && full && mantissa === 2 ** mantissaBits - 1) return NaN;
  if (kind === "fnuz" && sign < 0 && !exponent && !mantissa) return NaN;
  const fraction = mantissa / 2 ** mantissaBits;
  return sign * (exponent ? (1 + fraction) * 2 ** (exponent - bias) : fraction * 2 ** (1 - bias));
}

/** Turn the bytes of a tensor into numbers: a typed array, with two numbers for each complex value. */
export function decodeValues(bytes, dtype) {
  const Typed = ARRAYS[dtype];
  const Codes = dtype === "float16" || dtype === "bfloat16" ? Uint16Array : Uint8Array;
  if (dtype === "bool") return Uint8Array.from(bytes, (value) => Number(value !== 0));
  const { buffer } = new Uint8Array(bytes); // a copy, which starts at a multiple of every item size
  if (Typed) return new Typed(buffer); // JavaScript runs on little-endian machines
  const codes = new Codes(buffer);
  if (dtype === "bfloat16") return new Float32Array(Uint32Array.from(codes, (code) => code * 65536).buffer);
  if (dtype === "float8_e8m0fnu") return Float32Array.from(codes, (code) => (code === 255 ? NaN : 2 ** (code - 127)));
  const format = FLOATS[dtype];
  const width = format ? 1 + format[0] + format[1] : Number(dtype.replace(/^u?int/, ""));
  const signed = dtype.startsWith("int");
  const values = new (format ? Float32Array : signed ? Int8Array : Uint8Array)(codes.length);
  codes.forEach((code, i) => {
    const integer = signed ? (code << 24) >> 24 : code;
    const limit = 2 ** (signed ? width - 1 : width);
    if (integer >= limit || integer < -limit) throw new FileFormatError(`a byte is no value of ${dtype}`);
    values[i] = format ? decodeFloat(code, format) : integer;
  });
  return values;
}

/** A leaf: "array", "key" (of a random generator), "str" or a Python scalar's type, and what else is known of it. */
export class Leaf {
  constructor(kind, name, fields) {
    Object.assign(this, { kind, name, ...fields });
  }
}

/** Describe the leaf that a tensor and a note make; undefined if they contradict each other. */
function describeLeaf(name, noted, tensor) {
  const [word, argument] = Array.isArray(noted) ? noted : [noted];
  if (!tensor) return new Leaf(word, name, { value: word === "str" ? argument : readInt(argument) });
  const { dtype, shape } = tensor;
  const wide = word === "complex" || word?.endsWith("complex128"); // an axis of 2 for the parts
  const weak = word === "weak" || word === "weak complex128";
  const outer = (wide ? shape.slice(0, -1) : shape).map(Number); // BigInts are beside a 0 only
  const dtypes = wide ? ["F64"] : word === "weak" ? WEAK : [STORED[word] ?? dtype];
  const scalar = word in SCALARS || weak;
  if (!dtypes.includes(dtype) || (wide && shape.at(-1) !== 2) || (scalar && outer.length)) return undefined;
  const kind = word in SCALARS || word === "key" ? word : "array";
  const logical = wide ? "complex128" : word in NOTED ? word : NUMPY[dtype];
  return new Leaf(kind, name, { dtype: logical, shape: outer, weak, impl: argument });
}

const readInt = (literal) => (literal[0] === "-" ? -BigInt(literal.slice(1)) : BigInt(literal));

// --- Files ---------------------------------------------------------------------------------------

/** Make a source of bytes from a Blob or a File. */
export function blobSource(blob, label = blob.name ?? "the file") {
  const read = async (start, stop) => new Uint8Array(await blob.slice(start, stop).arrayBuffer());
  return { label, size: blob.size, read };
}

/** Make a source of bytes from an address, read by HTTP range requests. */
export function urlSource(url) {
  let whole; // a small file from a server that ignores ranges
  const known = {}; // the version and the size, as far as a server tells them: across origins, browsers hide headers
  const read = async (start, stop) => {
    if (whole) return whole.read(start, stop);
    if (start >= stop) return new Uint8Array();
    const response = await fetch(url, { headers: { Range: `bytes=${start}-${stop - 1}` } });
    if (response.status === 416) return new Uint8Array(); // nothing begins there
    if (!response.ok) throw new Error(`${url} answers with status ${response.status}`);
    const { headers } = response;
    const [, first = start, size] = /^bytes (\d+)-\d+\/(\d+)?/.exec(headers.get("Content-Range")) ?? [];
    const told = { version: headers.get("ETag") ?? headers.get("Last-Modified"), size };
    for (const name of Object.keys(told).filter((name) => told[name])) {
      known[name] ??= told[name];
      if (known[name] !== told[name]) throw new FileFormatError(`${url} was replaced while it was read: open it again`);
    }
    if (response.status !== 206) {
      whole = blobSource(await readSmall(response, url));
      return whole.read(start, stop);
    }
    const found = new Uint8Array(await response.arrayBuffer());
    if (Number(first) === start && found.length <= stop - start) return found;
    throw new Error(`${url} answers with another part of the file`);
  };
  return {
    label: String(url),
    get size() {
      return whole?.size ?? (known.size && Number(known.size));
    },
    read,
  };
}

/** Read all of a response, up to 64 MiB. */
async function readSmall(response, url) {
  const reader = response.body.getReader();
  const parts = [];
  let left = 2 ** 26;
  while (left >= 0 && Number(response.headers.get("Content-Length")) <= 2 ** 26) {
    const { done, value } = await reader.read();
    if (done) return new Blob(parts);
    parts.push(value);
    left -= value.length;
  }
  await reader.cancel();
  throw new Error(`${url} is on a server that does not serve parts of files`);
}

const HEAD = 2 ** 17; // bytes of a first request, which most headers fit in

/** Read and check the header of a file. */
async function readHeader(source) {
  const { label } = source;
  const refuse = (reason) => {
    throw new FileFormatError(`${label} ${reason}`);
  };
  let head = await source.read(0, HEAD);
  if (head.length < 8) refuse(`has ${head.length} bytes and is no safetensors file`);
  const length = new DataView(head.buffer, head.byteOffset).getBigUint64(0, true);
  if (length > MAX_HEADER) refuse(`is no safetensors file: it begins with a header length of ${length} bytes`);
  const dataStart = 8 + Number(length);
  if (head.length < dataStart) head = await source.read(0, dataStart);
  if (head.length < dataStart) refuse(`is cut short: its header should take ${length} bytes`);
  if (head[8] !== 0x7b || !length) refuse("is no safetensors file: its header does not begin with {");
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(head.subarray(8, dataStart));
  } catch {
    refuse("has a header that is not valid UTF-8");
  }
  const content = parseJSON(text, `the header of ${label}`);
  const metadata = content.get("__metadata__") ?? new Map();
  content.delete("__metadata__");
  if (!isTexts(metadata)) refuse("has metadata that do not map names to strings");
  if ([...metadata].flat().some((entry) => SURROGATE.test(entry))) refuse("has metadata with a lone surrogate");
  const tensors = [];
  for (const [name, entry] of content) tensors.push(readEntry(name, entry, refuse));
  tensors.sort((a, b) => a.start - b.start || a.stop - b.stop);
  let position = 0;
  for (const tensor of tensors) {
    if (tensor.start !== position) refuse(`has a gap or an overlap before the data of ${show(tensor.name)}`);
    position = tensor.stop;
    Object.assign(tensor, { source, start: dataStart + tensor.start, stop: dataStart + tensor.stop });
  }
  const end = dataStart + position;
  // Without a known size: one byte where two are asked for is the last one.
  const size = source.size ?? end - 1 + (await source.read(end - 1, end + 1)).length;
  if (size !== end) {
    const problem = size < end ? "is cut short" : "has bytes after its data";
    refuse(`${problem}: its header describes ${position} bytes of data`);
  }
  return { metadata, tensors: new Map(tensors.map((tensor) => [tensor.name, tensor])) };
}

function readEntry(name, entry, refuse) {
  if (SURROGATE.test(name)) refuse(`has the name ${show(name)}, which holds a lone surrogate`);
  const [dtype, shape, offsets] = ["dtype", "shape", "data_offsets"].map((member) => isMap(entry) && entry.get(member));
  if (typeof dtype !== "string" || !Array.isArray(shape) || !Array.isArray(offsets) || offsets.length !== 2) {
    refuse(`describes ${show(name)} otherwise than by dtype, shape and data_offsets`);
  }
  if (!Object.hasOwn(BITS, dtype)) refuse(`gives ${show(name)} the unknown dtype ${show(dtype)}`);
  if (shape.length > MAX_DIMENSIONS) refuse(`gives ${show(name)} ${shape.length} dimensions`);
  const isSize = (size) => (typeof size === "number" || typeof size === "bigint") && size >= 0 && size < 2n ** 64n;
  if (!shape.every(isSize)) refuse(`gives ${show(name)} a shape that is no list of sizes`);
  const [start, stop] = offsets;
  if (!isSize(start) || !isSize(stop) || start > stop) refuse(`gives ${show(name)} offsets that are no range`);
  const product = (sizes) => sizes.reduce((bits, size) => bits * BigInt(size), BigInt(BITS[dtype]));
  const quick = shape.reduce((bits, size) => bits * Number(size), BITS[dtype]);
  const bits = quick <= Number.MAX_SAFE_INTEGER ? quick : product(shape);
  if (bits != 8 * (Number(stop) - Number(start))) refuse(`gives ${show(name)} a shape and offsets of different sizes`);
  if (!quick && product(shape.filter(Boolean)) >= 2n ** 66n) refuse(`gives ${show(name)} a shape beyond any memory`);
  return { name, dtype, shape, start: Number(start), stop: Number(stop) };
}

// --- The note ------------------------------------------------------------------------------------

const EMPTY_KINDS = ["tuple", "None", "dict", "list", "PyTreeContainer", "UnkeyedContainer"];
const LEAF_KINDS = [...Object.keys({ ...SCALARS, ...NOTED }), "complex128", "weak", "weak complex128"];

function isNodeKind(kind) {
  if (typeof kind === "string") return EMPTY_KINDS.includes(kind);
  if (!Array.isArray(kind) || kind.length !== 2 || kind[0] !== "OrderedDict" || !Array.isArray(kind[1])) return false;
  return kind[1].every((segment) => typeof segment === "string" && segment[0] === "@");
}

function isLeafKind(kind) {
  if (typeof kind === "string") return LEAF_KINDS.includes(kind);
  if (!Array.isArray(kind) || kind.length !== 2 || typeof kind[1] !== "string") return false;
  if (kind[0] !== "int") return kind[0] === "str" || kind[0] === "key";
  if (!/^-?0x[1-9a-f][0-9a-f]{15,}$/.test(kind[1])) return false;
  const value = readInt(kind[1]);
  return value >= 2n ** 63n || value < -(2n ** 63n);
}

function readNote(text, tensors, label) {
  if (text === undefined) return { nodes: new Map(), leaves: new Map() };
  const refuse = (reason) => {
    throw new FileFormatError(`the note of ${label} ${reason}`);
  };
  const content = parseJSON(text, `the note of ${label}`);
  const version = isMap(content) && content.get("version");
  if (!["number", "bigint"].includes(typeof version) || version < 1) refuse("has no version");
  if (version !== 1) refuse(`is of version ${version}, and this reader knows version 1`);
  for (const member of content.keys()) {
    if (!["version", "nodes", "leaves"].includes(member)) refuse(`has an unknown entry ${show(member)}`);
  }
  const kinds = (member, isKind) => {
    const found = content.has(member) ? content.get(member) : new Map();
    if (!isMap(found)) refuse(`lists its ${member} in no object`);
    for (const [path, kind] of found) {
      if (!isKind(kind)) refuse(`gives ${show(path)} an unknown or malformed kind`);
    }
    return found;
  };
  const nodes = kinds("nodes", isNodeKind);
  const leaves = kinds("leaves", isLeafKind);
  const untensored = [...leaves.keys()].filter((path) => !tensors.has(path));
  for (const path of [...nodes.keys(), ...untensored]) {
    try {
      parseKeyPath(path);
    } catch (error) {
      refuse(`has a path that spells no key path: ${error.message}`);
    }
  }
  return { nodes, leaves };
}

// --- Trees ---------------------------------------------------------------------------------------

/** A node: its kind, and pairs of a key and a child in JAX's order. The keys of sequences are numbers. */
export class Node {
  constructor(kind, items) {
    this.kind = kind;
    this.items = items;
  }
}

const PLAIN = { attr: "PyTreeContainer", item: "dict", index: "list", flat: "UnkeyedContainer" };

const NO_CHILDREN = new Map(); // shared, as most places are leaves

/** The trie of the names of a file, with what the note says of its nodes. */
class Trie {
  constructor() {
    this.root = this.node("", undefined);
    this.keys = new Map(); // of segments
    this.deep = new Map(); // names that are too deep for a tree, and whether they are leaves
  }

  node(segment, parent) {
    return { segment, parent, children: NO_CHILDREN, leaf: undefined, kind: undefined };
  }

  /** Add a name; return its place. A name that is too deep gets the place where `build` refuses it. */
  add(name, leaf) {
    let place = this.root;
    const segments = splitKeyPath(name);
    for (const segment of segments) {
      if (!this.keys.has(segment)) this.keys.set(segment, readSegment(segment));
    }
    for (const segment of segments.slice(0, MAX_DEPTH + 1)) {
      if (place.children === NO_CHILDREN) place.children = new Map();
      let next = place.children.get(segment);
      if (!next) place.children.set(segment, (next = this.node(segment, place)));
      place = next;
    }
    const isLeaf = leaf !== undefined;
    if (segments.length > MAX_DEPTH) this.deep.set(name, isLeaf || this.deep.get(name));
    else if (isLeaf) place.leaf = leaf;
    return place;
  }

  name(place) {
    const segments = [];
    for (; place.parent; place = place.parent) segments.push(place.segment);
    return joinSegments(segments.reverse());
  }

  /** Give places the kinds of a note; throw what contradicts the tensors, or itself. */
  note(kinds, refuse) {
    const places = [...kinds].map(([name, kind]) => [this.add(name), kind, name]);
    for (const [place, kind, name] of places) {
      for (let above = place; above; above = above.parent) {
        if (above.leaf !== undefined) refuse(`has a node ${show(name)} at or below a leaf`);
      }
      if (this.deep.has(name)) continue;
      place.kind = kind;
      this.checkKind(name, kind, new Set(place.children.keys()), refuse);
    }
    if (this.deep.size) this.noteDeep(kinds, refuse);
  }

  /** Check the nodes that are too deep by their names alone, in an order in which those below a name follow it. */
  noteDeep(kinds, refuse) {
    const children = new Map(); // the segments of the children of each node
    const above = []; // what the current name begins with, and the nearest node and leaf of the tree above that
    for (const name of [...this.deep.keys()].sort()) {
      while (above.length && !name.startsWith(above.at(-1).name)) above.pop();
      let { node, isBelowLeaf } = above.at(-1) ?? { isBelowLeaf: false };
      const last = above.at(-1)?.name;
      if (last !== undefined && ".@#".includes(name[last.length])) {
        if (kinds.has(last)) node = last;
        isBelowLeaf ||= this.deep.get(last) === true;
      }
      if (node !== undefined) children.get(node).add(splitKeyPath(name)[splitKeyPath(node).length]);
      if (kinds.has(name)) {
        if (isBelowLeaf || this.deep.get(name)) refuse(`has a node ${show(name)} at or below a leaf`);
        children.set(name, new Set());
      }
      above.push({ name, node, isBelowLeaf });
    }
    for (const [name, segments] of children) {
      for (const segment of segments) if (!this.keys.has(segment)) this.keys.set(segment, readSegment(segment));
      this.checkKind(name, kinds.get(name), segments, refuse);
    }
  }

  /** Refuse the kind of a node that its children, a set of segments, contradict. */
  checkKind(name, kind, children, refuse) {
    const [word, keys] = Array.isArray(kind) ? kind : [kind];
    const count = keys ? new Set(keys).size : 0;
    const [marker, other] = this.markers(children);
    const fits = keys
      ? count === keys.length && count === children.size && keys.every((key) => children.has(key))
      : !marker || (word === "tuple" && marker === "index" && !other);
    if (!fits) refuse(`calls ${show(name)} ${word}, which its children contradict`);
  }

  markers(segments) {
    return [...new Set(Array.from(segments, (segment) => this.keys.get(segment).kind))];
  }

  /** Build the tree. */
  build() {
    const places = [this.root]; // parents before children
    for (const place of places) {
      place.depth = place.parent ? place.parent.depth + 1 : 0;
      if (place.depth > MAX_DEPTH) throw new TreeStructureError(`${show(this.name(place))} is nested too deep`);
      for (const child of place.children.values()) places.push(child);
    }
    this.gaps = 0;
    for (const place of places.reverse()) {
      if (place.leaf !== undefined && place.children.size) {
        throw new TreeStructureError(`${show(this.name(place))} names a leaf and a node`);
      }
      place.built = place.leaf ?? this.finish(place);
    }
    return this.root.built;
  }

  finish(place) {
    const word = Array.isArray(place.kind) ? place.kind[0] : place.kind;
    if (!place.children.size) return new Node(word ?? "dict", []);
    const [marker, other] = this.markers(place.children.keys());
    const refuse = (reason) => {
      throw new TreeStructureError(`the node ${show(this.name(place))} ${reason}`);
    };
    if (other) refuse("has children of two kinds");
    const segments = word === "OrderedDict" ? place.kind[1] : [...place.children.keys()];
    let items = segments.map((segment) => [this.keys.get(segment).value, place.children.get(segment).built]);
    const texts = items.every(([key]) => typeof key === "string");
    if (!texts && marker === "item" && new Set(items.map(([key]) => identity(key))).size < items.length) {
      refuse("has keys that are equal in Python");
    }
    if (word !== "OrderedDict") {
      items.sort(([a], [b]) => compareKeys(a, b) ?? refuse("has keys that Python cannot sort"));
    }
    if (marker === "index" || marker === "flat") {
      const length = items.at(-1)[0] + 1;
      const gaps = length - items.length;
      this.gaps += gaps;
      if (marker === "flat" && gaps) refuse(`lacks ${gaps} of its ${length} children`);
      if (this.gaps > MAX_GAPS) refuse(`makes a list of ${length} elements with too many gaps`);
      const known = new Map(items);
      if (gaps) items = Array.from({ length }, (_, i) => [i, known.get(i) ?? new Node("None", [])]);
    }
    return new Node(word ?? PLAIN[marker], items);
  }
}

// --- Checkpoints ---------------------------------------------------------------------------------

/** An open file, or an open folder of shards. Its tensors map names to dtypes, shapes and places. */
export class Checkpoint {
  constructor(label, metadata, tensors, { nodes, leaves }) {
    const isOwn = ([key, value]) => !isReserved(key) && !(key === "format" && value === "flax");
    this.label = label;
    this.allMetadata = metadata;
    this.metadata = new Map([...metadata].filter(isOwn));
    this.tensors = tensors;
    this.leaves = new Map(); // in the order of the tensors
    this.nodes = nodes;
    for (const [name, kind] of leaves) {
      const valued = kind[0] === "str" || kind[0] === "int";
      if (valued === tensors.has(name)) this.refuse(`has a note that contradicts the tensors at ${show(name)}`);
      if (valued) this.leaves.set(name, describeLeaf(name, kind));
    }
    for (const [name, tensor] of tensors) {
      const leaf = describeLeaf(name, leaves.get(name), tensor);
      this.leaves.set(name, leaf ?? this.refuse(`has a note and a tensor ${show(name)} that contradict each other`));
    }
    if (nodes.size) this.trie({ lenient: true });
  }

  refuse(reason) {
    throw new FileFormatError(`${this.label} ${reason}`);
  }

  /** Make the trie of the names. If lenient, leave out names that spell no key path: a template may use them. */
  trie({ lenient }) {
    const trie = new Trie();
    for (const [name, leaf] of this.leaves) {
      try {
        trie.add(name, leaf);
      } catch (error) {
        if (!lenient || !(error instanceof Pytree2SafetensorsError)) throw error;
      }
    }
    trie.note(this.nodes, (reason) => this.refuse(`has a note that ${reason}`));
    return trie;
  }

  /** Build the tree: a Node or a Leaf. */
  tree() {
    return this.trie({ lenient: false }).build();
  }

  /** Read the bytes of a tensor, or those from `start` to `stop`, which count items of `width` bytes. */
  async bytes(name, start = 0, stop = Infinity, width = 1) {
    const tensor = this.tensors.get(name);
    const end = Math.min((tensor.stop - tensor.start) / width, stop);
    if (![start, end, end - start].every((count) => Number.isInteger(count) && count >= 0)) {
      throw new RangeError(`${show(name)} has no range from ${start} to ${stop}`);
    }
    const found = await tensor.source.read(tensor.start + start * width, tensor.start + end * width);
    if (found.length !== (end - start) * width) this.refuse(`is cut short in the data of ${show(name)}`);
    return found;
  }

  /** Read the values of a leaf, or those from `start` to `stop`: a typed array, or what the note holds. */
  async values(name, start = 0, stop = Infinity) {
    const leaf = this.leaves.get(name);
    if (leaf.value !== undefined) return leaf.value;
    if (!leaf.dtype) this.refuse(`has ${show(name)} in a packed dtype, which this reader does not unpack`);
    if (leaf.kind === "key") this.keyShape(leaf);
    const width = leaf.dtype === "complex128" ? 16 : BITS[this.tensors.get(name).dtype] / 8;
    return decodeValues(await this.bytes(name, start, stop, width), leaf.dtype);
  }

  /** Tell the shape of an array of keys: that of its data without the words of each key. */
  keyShape({ name, impl, shape }) {
    const words = Object.hasOwn(KEY_WORDS, impl) ? KEY_WORDS[impl] : undefined;
    if (!words) this.refuse(`has a key ${show(name)} of an unknown implementation ${show(impl)}`);
    if (shape.at(-1) !== words) this.refuse(`has a key ${show(name)} whose data are of another shape`);
    return shape.slice(0, -1);
  }

  /**
   * Check a tensor against its digest, reading a block at a time; return false if the file has no digests, or if
   * `isWanted` says that nobody waits any more.
   */
  async check(name, isWanted = () => true) {
    if (!this.digests) return false;
    const { dtype, shape, start, stop } = this.tensors.get(name);
    const parts = [`${compactJSON([name, dtype]).slice(0, -1)},[${shape}]]`];
    for (let at = 0; at < stop - start; at += BLOCK) {
      if (!isWanted()) return false;
      parts.push(new Uint8Array(await crypto.subtle.digest("SHA-256", await this.bytes(name, at, at + BLOCK))));
    }
    if ((await digest(new Blob(parts))) !== this.digests.get(name)) {
      this.refuse(`has a tensor ${show(name)} that does not match its digest`);
    }
    return true;
  }

  /** Check the digest of the metadata, and that there is a digest for each tensor. */
  async readDigests() {
    const found = this.allMetadata.get(METADATA_DIGEST);
    const digests = this.allMetadata.get(DIGESTS);
    if (found === undefined && digests === undefined) return;
    if (!globalThis.crypto?.subtle) return; // browsers have SHA-256 in secure contexts only
    const others = new Map(this.allMetadata);
    others.delete(METADATA_DIGEST);
    if (digests === undefined || found !== (await digest(new Blob([compactJSON(others)])))) {
      this.refuse("has metadata that do not match their digest");
    }
    this.digests = parseJSON(digests, `the digests of ${this.label}`);
    if (!isTexts(this.digests)) this.refuse("has digests that do not map names to digests");
    const missing = [...this.tensors.keys()].some((name) => !this.digests.has(name));
    if (missing || this.digests.size !== this.tensors.size) this.refuse("has tensors and digests of different names");
  }
}

async function digest(blob) {
  const found = new Uint8Array(await crypto.subtle.digest("SHA-256", await blob.arrayBuffer()));
  return Array.from(found.subarray(0, 16), (byte) => hex(byte, 2)).join("");
}

async function checkpoint(label, metadata, tensors) {
  const found = new Checkpoint(label, metadata, tensors, readNote(metadata.get(NOTE), tensors, label));
  await found.readDigests();
  return found;
}

/** Open one safetensors file. */
export async function openFile(source) {
  const { metadata, tensors } = await readHeader(source);
  return checkpoint(source.label, metadata, tensors);
}

/** Open the shards of an index; `find` gives the source of a file in its folder, or undefined. */
export async function openIndex(source, find) {
  const { label } = source;
  const refuse = (reason) => {
    throw new FileFormatError(`the index ${label} ${reason}`);
  };
  const bytes = await source.read(0, MAX_HEADER + 1);
  if (bytes.length > MAX_HEADER) refuse(`has more than ${MAX_HEADER} bytes`);
  let content;
  try {
    content = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    refuse("is not valid UTF-8");
  }
  content = parseJSON(content, `the index ${label}`);
  const places = isMap(content) && content.get("weight_map");
  if (!isTexts(places)) refuse("has no weight_map of names to names of files");
  if (!content.has("metadata") && content.size > 1) refuse("has another entry in place of its metadata");
  const all = content.get("metadata") ?? new Map();
  if (!isMap(all)) refuse("has metadata that are no object");
  const metadata = new Map();
  for (const [key, value] of all) {
    if (typeof value === "string" && key !== "total_size") metadata.set(key, value);
    else if (isReserved(key)) refuse(`has ${show(key)}, which is no string`);
  }
  if ([...metadata].flat().some((text) => SURROGATE.test(text))) refuse("has metadata with a lone surrogate");
  const shards = new Map();
  for (const shard of new Set(places.values())) {
    const plain = !/^\.{0,2}$|[/\\\0]|\p{Surrogate}/u.test(shard);
    if (!plain) refuse(`names ${show(shard)}, which is no plain name of a file`);
    shards.set(shard, find(shard) ?? refuse(`names the shard ${show(shard)}, which is missing`));
  }
  const read = new Map();
  const waiting = shards.entries(); // shared by all that read
  const readSome = async () => {
    try {
      for (const [shard, found] of waiting) read.set(shard, await readHeader(found));
    } catch (error) {
      shards.clear(); // so that the others stop
      throw error;
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, readSome));
  const tensors = new Map();
  for (const [name, shard] of places) {
    const tensor = read.get(shard).tensors.get(name);
    tensors.set(name, tensor ?? refuse(`places ${show(name)} in ${show(shard)}, which lacks it`));
  }
  return checkpoint(label, metadata, tensors);
}

const INDEX = /^(.*)\.safetensors\.index(?:\.[^.]+)?\.json$/s;

/** Open a folder: pairs of the name of a file and its source. */
export async function openFolder(files) {
  const folder = new Map(files);
  const refuse = (reason) => {
    throw new FileFormatError(`the folder ${reason}`);
  };
  const names = [...folder.keys()].sort(compareText);
  const only = (found) => (found.length > 1 ? refuse(`has ${found.map(show).join(", ")}: name one`) : found[0]);
  const usual = "model.safetensors";
  const first = `${usual}.index.json`;
  const indexes = folder.has(first) ? [first] : names.filter((name) => INDEX.test(name));
  if (indexes.length) {
    const singles = [usual, `${INDEX.exec(indexes[0])[1]}.safetensors`];
    const index = only([...indexes, ...names.filter((name) => singles.includes(name))]);
    return openIndex(folder.get(index), (name) => folder.get(name));
  }
  if (folder.has(usual)) return openFile(folder.get(usual));
  const stemOf = (name) => /^(.*)-[0-9]{5,}-of-[0-9]{5,}\.safetensors$/s.exec(name)?.[1];
  // A save of one file removes the older shards with its stem at the end.
  const isReplaced = (name) => stemOf(name) !== undefined && folder.has(`${stemOf(name)}.safetensors`);
  const left = names.filter((name) => !isReplaced(name));
  const shard = left.find((name) => stemOf(name) !== undefined);
  if (shard) refuse(`has ${show(shard)} and no index`);
  const single = only(left.filter((name) => name.endsWith(".safetensors")));
  return openFile(folder.get(single) ?? refuse("has no safetensors file and no index"));
}

/** Open an address: that of a safetensors file, or of an index, whose query goes with its shards. */
export function openUrl(url) {
  const source = urlSource(url);
  const { pathname, search } = new URL(url);
  const sibling = (name) => urlSource(new URL(encodeURIComponent(name) + search, url));
  return pathname.endsWith(".json") ? openIndex(source, sibling) : openFile(source);
}
