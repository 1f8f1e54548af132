"use strict";
// A site without a server: lists, searches and features from the files beside the page. Text becomes text here
// (textContent); HTML was drawn and escaped when the site was written, and is only put in its place.

const site = JSON.parse(document.querySelector("meta[name=saeql-site]").content);
const LIST_FEATURES = 1024, ROWS = 50, MAX_ROWS = 200, MAX_COMPLETIONS = 24;
const grouped = (number) => number.toLocaleString("en-US");
const say = (tag, text, attributes = {}) => {
  const made = Object.assign(document.createElement(tag), { textContent: text });
  Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
  return made;
};
const notice = (text) => say("p", text, { class: "notice", role: "status" });
/** Characters that would not show, or would reorder others, as [U+XXXX]; only what was typed still has any. */
const visible = (text) => text.replace(/(?![\n\t])[\p{C}\p{Zl}\p{Zp}]/gu, (c) => `[U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`);

// --- data: every file is a script that calls saeqlData ---------------------------------------------------------------

const TYPES = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i4: Int32Array, f4: Float32Array, f8: Float64Array };
const files = new Map();

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const plain = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
  const end = new Uint8Array(plain).indexOf(10);
  const found = JSON.parse(new TextDecoder().decode(new Uint8Array(plain, 0, end)));
  let at = end + 1;
  for (const [name, type, length] of found.columns) {
    const stop = at + length * TYPES[type].BYTES_PER_ELEMENT;
    found[name] = new TYPES[type](plain.slice(at, stop));
    at = stop;
  }
  return found;
}

/** The content of data/PLACE/NAME.js, loaded once. */
function load(name) {
  const path = `${site.place}/${name}`;
  if (!files.has(path)) {
    const file = {};
    file.content = new Promise((resolve, reject) => {
      const lost = () => { files.delete(path); reject(new Error(`data/${path}.js cannot be loaded: some of this site is missing`)); };
      const script = document.createElement("script");
      file.take = (text) => { file.taken = true; unpack(text).then(resolve, lost); };
      script.onerror = lost;
      script.onload = () => { script.remove(); if (!file.taken) lost(); };
      script.src = `data/${path}.js?v=${site.version}`;
      document.head.append(script);
    });
    files.set(path, file);
  }
  return files.get(path).content;
}
globalThis.saeqlData = (path, text) => files.get(path)?.take(text);

function sums(steps) {
  const found = new Int32Array(steps.length);
  for (let n = 0, sum = 0; n < steps.length; n++) found[n] = sum += steps[n];
  return found;
}

/** The first place in ascending values that is not below a value. */
function place(values, value) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < value) low = middle + 1; else high = middle;
  }
  return low;
}

/** Which file holds a number: `starts` are the first numbers of every file, and the end. */
const fileOf = (starts, number) => Math.min(place(starts, number + 1), starts.length - 1) - 1;

// --- features by their place in the site and by their number ---------------------------------------------------------

let numbers = null; // of the features, where some were left out
async function known() {
  if (!site.all && !numbers) numbers = sums((await load("numbers")).steps);
}
const numberOf = (at) => (numbers ? numbers[at] : at);
const placeOf = (number) => {
  const at = numbers ? place(numbers, number) : number;
  return at >= 0 && at < site.count && numberOf(at) === number ? at : -1;
};

// --- searches: places of features, best first, and why ---------------------------------------------------------------

/** The terms that a word stands for: its own, else those of words that it begins, else those of what is left without
 * its ending. */
function termsOf(word, index) {
  const exact = (text) => { const n = place(index.list, text); return index.list[n] === text ? [index.terms[n]] : []; };
  const begun = (text) => {
    const terms = new Set();
    for (let n = place(index.list, text); n < index.list.length && index.list[n].startsWith(text); n++) terms.add(index.terms[n]);
    return [...terms].sort((a, b) => index.features[b] - index.features[a] || a - b).slice(0, MAX_COMPLETIONS);
  };
  const stems = [1, 2, 3].filter((cut) => word.length - cut > 2).map((cut) => word.slice(0, -cut));
  const tries = [[exact, word], [begun, word], ...stems.map((text) => [exact, text]), ...stems.map((text) => [begun, text])];
  for (const [find, text] of tries) {
    const terms = find(text);
    if (terms.length) return terms;
  }
  return [];
}

async function byWords(text) {
  const asked = [...new Set(text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [])];
  if (!asked.length) throw new Error(`nothing to search for in '${visible(text)}': give at least one word`);
  const index = await load("words");
  index.list ??= index.words.split("\n");
  index.terms ??= sums(index.term);
  const total = new Map(), postings = [], counted = new Set();
  for (const word of asked) {
    const best = new Map(); // of a word that begins several, its best one counts
    for (const term of termsOf(word, index)) {
      if (counted.has(term)) continue;
      counted.add(term);
      const number = fileOf(index.shards, term), file = await load(`p${number}`);
      file.at ??= sums(file.position);
      file.words ??= sums(file.word);
      const local = term - index.shards[number], sum = new Map();
      for (let n = local ? file.ends[local - 1] : 0; n < file.ends[local]; n++) {
        sum.set(file.at[n], (sum.get(file.at[n]) ?? 0) + Math.fround(file.score[n] / 1000));
        postings.push([term, file, n]);
      }
      for (const [at, score] of sum) best.set(at, Math.max(best.get(at) ?? 0, score));
    }
    for (const [at, score] of best) total.set(at, (total.get(at) ?? 0) + score);
  }
  const order = [...total.keys()].sort((a, b) => total.get(b) - total.get(a) || a - b);
  const why = (shown) => {
    const wanted = new Map(shown.map((at) => [at, []]));
    for (const [term, file, n] of postings) wanted.get(file.at[n])?.push([term, -file.score[n], index.list[file.words[n]], index.fields[file.field[n]]]);
    return new Map([...wanted].map(([at, found]) => {
      const reasons = new Map();
      found.sort((a, b) => a[0] - b[0] || a[1] - b[1] || (a[2] < b[2] ? -1 : a[2] > b[2] ? 1 : 0));
      for (const [, , word, field] of found) {
        if (!reasons.has(field)) reasons.set(field, []);
        if (!reasons.get(field).includes(word)) reasons.get(field).push(word);
      }
      return [at, [...reasons]];
    }));
  };
  return { order, why };
}

async function tokenEntries(text) {
  const index = await load("tokens");
  for (const spelled of [text, ` ${text}`]) {
    const token = place(index.tokens, spelled);
    if (index.tokens[token] !== spelled) continue;
    const number = fileOf(index.shards, token), file = await load(`s${number}`), local = token - index.shards[number];
    const range = (ends) => [local ? ends[local - 1] : 0, ends[local]];
    return { token: visible(spelled), file, range, firing: index.firing[token] };
  }
  throw new Error(`no feature here fires on or promotes '${visible(text)}' as one token`);
}

async function byToken(text) {
  const { token, file, range, firing } = await tokenEntries(text);
  const [first, last] = range(file.fires_ends), order = Array.from(file.fires.subarray(first, last));
  const why = (shown) => new Map(shown.map((at) => {
    const n = first + order.indexOf(at);
    return [at, [[`fires on [${token}]`, [`${file.count[n]} times`, `${file.of_token[n]}% of the token's`, `${file.of_feature[n]}% of its own`]]]];
  }));
  return { order, why, best: site.count === site.features && firing > order.length ? `of ${grouped(firing)} ` : "" };
}

async function byEffect(text) {
  const { token, file, range } = await tokenEntries(text);
  const [first, last] = range(file.promotes_ends), order = Array.from(file.promotes.subarray(first, last));
  return { order, why: (shown) => new Map(shown.map((at) => [at, [[`promotes [${token}]`, [`rank ${file.rank[first + order.indexOf(at)]}`]]]])) };
}

const WAYS = { words: byWords, token: byToken, effect: byEffect };

// --- lists -----------------------------------------------------------------------------------------------------------

function question(query) {
  const given = new URLSearchParams(query), text = (name) => given.get(name) ?? "";
  const number = (name) => {
    if (!text(name).trim()) return null;
    if (!Number.isFinite(Number(text(name)))) throw new Error(`${name} is a number, not '${visible(text(name).slice(0, 40))}'`);
    return Number(text(name));
  };
  const whole = (name, usual, most) => {
    if (text(name) && !/^\d{1,9}$/.test(text(name))) throw new Error(`${name} is a whole number, not '${visible(text(name).slice(0, 40))}'`);
    return Math.min(Math.max(Number(text(name) || usual), 1), most);
  };
  const by = text("by") || "words";
  if (!Object.hasOwn(WAYS, by)) throw new Error(`no search by '${visible(by.slice(0, 40))}' on these pages: there is ${Object.keys(WAYS).join(", ")}`);
  if (text("where")) throw new Error("SQL conditions are for `saeql serve`: these pages compute nothing");
  return {
    q: text("q"), by, kind: text("kind"), low: number("min_density"), high: number("max_density"), auroc: number("min_auroc"),
    sort: text("sort"), order: text("order"), page: whole("page", 1, 1e6), rows: whole("rows", ROWS, MAX_ROWS),
    with: (page) => { const other = new URLSearchParams(given); if (page > 1) other.set("page", page); else other.delete("page"); return `?${other}`; },
  };
}

const part = (number) => load(`c${number}`);
const parts = () => Promise.all(Array.from({ length: Math.ceil(site.count / LIST_FEATURES) }, (_, n) => part(n)));

/** Places of the features that are asked for, in order. */
async function selected(asked, found) {
  const narrowed = asked.kind || asked.low !== null || asked.high !== null || asked.auroc !== null;
  let places = found ? found.order : null;
  if (!narrowed && !asked.sort) return places ?? { length: site.count, slice: (a, b) => Array.from({ length: Math.max(Math.min(b, site.count) - a, 0) }, (_, n) => a + n) };
  places ??= Array.from({ length: site.count }, (_, n) => n);
  const all = await parts();
  const kind = asked.kind ? all[0].kinds.indexOf(asked.kind) : -1;
  const of = (name, at) => all[Math.floor(at / LIST_FEATURES)][name][at % LIST_FEATURES];
  places = places.filter((at) => (!asked.kind || of("kind", at) === kind)
    && (asked.low === null || of("density", at) >= asked.low) && (asked.high === null || of("density", at) <= asked.high)
    && (asked.auroc === null || of("auroc", at) >= asked.auroc));
  if (!asked.sort) return places;
  const descending = asked.order ? asked.order === "desc" : !["feature", "label"].includes(asked.sort);
  if (asked.sort === "feature") return places.sort((a, b) => (descending ? b - a : a - b));
  if (asked.sort === "label") {
    const rank = (await load("labels"))[descending ? "descending" : "ascending"];
    return places.sort((a, b) => rank[a] - rank[b]);
  }
  if (!["density", "auroc", "max_activation"].includes(asked.sort)) throw new Error("no list is sorted by that: there is feature, label, density, auroc, max_activation");
  const key = (at) => { const value = of(asked.sort, at); return Number.isNaN(value) ? Infinity : descending ? -value : value; };
  const keys = new Map(places.map((at) => [at, key(at)]));
  return places.sort((a, b) => (keys.get(a) === keys.get(b) ? a - b : keys.get(a) - keys.get(b)));
}

const address = (number) => `${site.feature}?id=${number}`;

async function table(places, reasons) {
  const made = document.getElementById(reasons ? "list-searched" : "list-plain").content.cloneNode(true);
  const kinds = document.getElementById("list-kinds").content.children;
  for (const at of places) {
    const about = await part(Math.floor(at / LIST_FEATURES)), n = at % LIST_FEATURES;
    const row = document.getElementById("list-row").content.querySelector("tr").cloneNode(true);
    const [link, label, kind, auroc, density, why] = [row.querySelector("a"), row.querySelector(".label"), ...Array.from(row.cells).slice(2)];
    link.textContent = numberOf(at);
    link.href = address(numberOf(at));
    label.textContent = about.label[n];
    label.classList.toggle("no-label", about.kinds[about.kind[n]] === "none");
    kind.replaceChildren(kinds[about.kind[n]].cloneNode(true));
    auroc.textContent = about.auroc_text[n];
    density.textContent = about.density_text[n];
    if (!reasons) why.remove();
    else {
      const found = reasons.get(at);
      why.replaceChildren(...found.flatMap(([what, words], place) => [say("span", what, { class: "soft" }), ` ${words.slice(0, 4).join(", ")}${place + 1 < found.length ? "; " : ""}`]));
    }
    made.querySelector("tbody").append(row);
  }
  return made;
}

function paging(asked, pages) {
  const nav = say("nav", "", { class: "paging", "aria-label": "Pages of the list" });
  const to = (text, page, more = {}) => say("a", text, { href: asked.with(page), ...more });
  if (asked.page > 1) nav.append(to("first", 1), " ", to("previous", asked.page - 1, { rel: "prev" }), " ");
  nav.append(say("span", `${grouped(asked.page)} of ${grouped(pages)}`));
  if (asked.page < pages) nav.append(" ", to("next", asked.page + 1, { rel: "next" }), " ", to("last", pages));
  return nav;
}

/** What stands in #results for an address of the list; browser.js shows it. */
globalThis.drawList = async (to) => {
  try {
    const asked = question(new URL(to, location.href).search);
    await known();
    const found = asked.q ? await WAYS[asked.by](asked.q) : null;
    const places = await selected(asked, found);
    const shown = places.slice((asked.page - 1) * asked.rows, asked.page * asked.rows);
    const pages = Math.ceil(places.length / asked.rows);
    const count = say("p", "", { class: "count", role: "status" });
    count.append(say("b", grouped(places.length)), ` feature${places.length === 1 ? "" : "s"}${pages > 1 ? `, page ${grouped(asked.page)} of ${grouped(pages)}` : ""}`);
    const cut = found?.best ? [notice(`The ${found.order.length} ${found.best}features that stand for this token best.`)] : [];
    const nodes = [count, ...cut, shown.length ? await table(shown, found ? found.why(shown) : null) : say("p", "Nothing meets all of this.", { class: "empty" })];
    return pages > 1 ? [...nodes, paging(asked, pages)] : nodes;
  } catch (error) {
    return [notice(error.message)];
  }
};

async function startList(form) {
  if (!location.search) return; // its first page was drawn with the site
  const given = new URLSearchParams(location.search);
  for (const field of form.elements) if (field.name && given.has(field.name)) field.value = given.get(field.name);
  form.querySelector("[name=q]").placeholder = form.querySelector("[name=by]").selectedOptions[0].dataset.hint;
  form.querySelector("[name=sort] option").textContent = given.get("q") ? "best match" : "number";
  form.querySelector("details").open = ["min_density", "max_density", "min_auroc", "order"].some((name) => given.get(name));
  const results = document.getElementById("results");
  results.setAttribute("aria-busy", "true");
  results.replaceChildren(...await globalThis.drawList(location.href));
  results.setAttribute("aria-busy", "false");
  if (given.get("q")) document.title = `${visible(given.get("q"))} · Features · saeql`;
}

// --- one feature -----------------------------------------------------------------------------------------------------

async function feature(frame, around) {
  const given = new URLSearchParams(location.search), id = given.get("id") ?? "";
  await known();
  const at = /^\d{1,9}$/.test(id) ? placeOf(Number(id)) : -1;
  if (at < 0) throw new Error(`there is no feature '${visible(id.slice(0, 40))}' here: the list has those that there are`);
  const file = await load(`f${Math.floor(at / site.per_file)}`);
  const page = new DOMParser().parseFromString(file.parts.map((part) => part[at % site.per_file]).join(""), "text/html");
  if (given.get("shade") === "all") page.querySelector(".by-position")?.classList.add("shaded");
  if (given.get("split") === "test") {
    page.querySelector("article").classList.add("tested");
    page.querySelector(".to-train").removeAttribute("aria-current");
    page.querySelector(".to-test").setAttribute("aria-current", "true");
    page.querySelectorAll(".if-plain").forEach((link) => { link.setAttribute("href", `${link.getAttribute("href")}&split=test`); });
  }
  frame.replaceChildren(...page.body.childNodes);
  document.title = `${frame.querySelector("h1").textContent.trim().replace(/\s+/g, " ")} · saeql`;
  for (const [step, rel, text] of [[-1, "prev", (n) => `← ${n}`], [1, "next", (n) => `${n} →`]]) {
    if (at + step >= 0 && at + step < site.count) around.append(" ", say("a", text(numberOf(at + step)), { rel, href: address(numberOf(at + step)) }));
  }
}

const frame = document.getElementById("feature");
if (frame) feature(frame, document.querySelector(".around")).catch((error) => frame.replaceChildren(notice(error.message))).finally(() => frame.setAttribute("aria-busy", "false"));
else if (document.getElementById("list-row")) startList(document.getElementById("filters"));
