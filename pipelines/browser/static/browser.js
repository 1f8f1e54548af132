"use strict";
// Everything here makes pages quicker to use; all of them but steering work without it.

const $ = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
const typing = () => ["INPUT", "TEXTAREA", "SELECT"].includes(document.activeElement?.tagName);

// --- theme -----------------------------------------------------------------------------------------------------------

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("saeql-theme", root.dataset.theme); } catch { /* not kept */ }
}
$("#theme")?.addEventListener("click", switchTheme);
$("#keys")?.addEventListener("click", () => $("#help").showModal());

// --- keyboard --------------------------------------------------------------------------------------------------------

let waitsForPlace = false;

function move(step) {
  const rows = all("[data-row]");
  if (!rows.length) return $(step > 0 ? "a[rel=next]" : "a[rel=prev]")?.click();
  const now = rows.findIndex((row) => row.classList.contains("chosen"));
  rows[now]?.classList.remove("chosen");
  const next = rows[Math.max(0, Math.min(rows.length - 1, now + step))];
  next.classList.add("chosen");
  next.scrollIntoView({ block: "nearest" });
  $("a", next)?.focus({ preventScroll: true });
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && typing()) return document.activeElement.blur();
  if (event.ctrlKey && event.key === "Enter" && document.activeElement?.form) return document.activeElement.form.requestSubmit();
  if (typing() || event.ctrlKey || event.metaKey || event.altKey || $("dialog[open]")) return;
  if (waitsForPlace) {
    waitsForPlace = false;
    if (/^[a-z]$/.test(event.key)) $(`[data-place=${event.key}]`)?.click();
    return;
  }
  const actions = {
    "/": () => ($("#f-q") ?? $("#jump"))?.focus(),
    j: () => move(1), k: () => move(-1),
    n: () => $("a[rel=next]")?.click(), p: () => $("a[rel=prev]")?.click(),
    g: () => { waitsForPlace = true; }, t: switchTheme, "?": () => $("#help").showModal(),
  };
  if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
});

// --- lists: search as you type ---------------------------------------------------------------------------------------

const filters = $("#filters");
let asking = null;

async function show(address, keep) {
  asking?.abort();
  const mine = asking = new AbortController();
  const results = $("#results");
  results.setAttribute("aria-busy", "true");
  try {
    const nodes = await (globalThis.drawList ?? fetchList)(address, mine.signal); // a site without a server draws its own
    if (mine.signal.aborted) return;
    results.replaceChildren(...nodes);
    if (keep === "push") history.pushState(null, "", address);
    if (keep === "replace") history.replaceState(null, "", address);
    results.setAttribute("aria-busy", "false");
  } catch (error) {
    if (error.name !== "AbortError") location.assign(address);
  }
}

async function fetchList(address, signal) {
  const answer = await fetch(address, { signal, headers: { accept: "text/html" } });
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  return ($("#results", page) ?? $("main", page)).childNodes;
}

function asked() {
  const fields = Array.from(new FormData(filters)).filter(([, value]) => value !== "");
  const kept = fields.filter(([name, value]) => !(name === "by" && value === "words"));
  return filters.getAttribute("action") + (kept.length ? "?" + new URLSearchParams(kept) : "");
}

if (filters) {
  let timer = 0;
  const slow = () => ["meaning", "like"].includes($("#f-by").value);
  const hint = () => { $("#f-q").placeholder = $("#f-by").selectedOptions[0].dataset.hint; };
  filters.addEventListener("input", (event) => {
    hint();
    clearTimeout(timer);
    if (event.target.name === "where") return; // half a condition is none
    timer = setTimeout(() => show(asked(), "replace"), event.target.tagName === "SELECT" ? 0 : slow() ? 500 : 120);
  });
  filters.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(timer);
    show(asked(), "push");
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.(".paging a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(link.getAttribute("href"), "push").then(() => scrollTo(0, 0));
  });
  addEventListener("popstate", () => location.reload());
}
all("[data-submit]").forEach((field) => field.addEventListener("change", () => field.form.requestSubmit()));
all("form[data-busy]").forEach((form) => form.addEventListener("submit", () => {
  const said = $(".row .soft", form);
  if (said) said.textContent = form.dataset.busy;
}));
if (/^#t\d+$/.test(location.hash)) $("details:has(.by-token)")?.setAttribute("open", "");
all(".pick a").forEach((link) => link.addEventListener("click", () => $("details:has(.by-token)")?.setAttribute("open", "")));

// --- copy ------------------------------------------------------------------------------------------------------------

document.addEventListener("click", async (event) => {
  const button = event.target.closest?.("[data-copy]");
  if (!button) return;
  const code = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(code);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
});

// --- steering --------------------------------------------------------------------------------------------------------

const post = (path, value, signal) => fetch(path, { method: "POST", signal, headers: { "content-type": "application/json" }, body: JSON.stringify(value) });
let writing = null;

// Both texts into target.baseline and target.steered as they are written; true where they came to their end.
async function writeBoth(asked, target, stop, state) {
  writing?.abort();
  const mine = writing = new AbortController();
  let done = false;
  all("[data-prompt]").forEach((place) => { place.textContent = asked.prompt; });
  Object.values(target).forEach((place) => { place.textContent = ""; place.classList.add("cursor"); });
  stop.disabled = false;
  state("the model writes…");
  try {
    const answer = await post("/api/v1/steer", asked, mine.signal);
    if (!answer.ok) { state((await answer.json()).error); return false; }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done: over, value } = await reader.read();
      if (over) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events.map((text) => JSON.parse(text.slice(6)))) {
        if (event.text) target[event.side].textContent += event.text;
        if (event.end) target[event.side].classList.remove("cursor");
        if (event.error) state(event.error);
        if (event.done) { state("done"); done = true; }
      }
    }
  } catch (error) {
    if (writing === mine) state(error.name === "AbortError" ? "stopped" : "the server did not answer");
  } finally {
    if (writing === mine) {
      stop.disabled = true;
      Object.values(target).forEach((place) => place.classList.remove("cursor"));
    }
  }
  return done;
}

const steer = $("#steer");
if (steer) {
  const edits = () => all(".edit", steer).map((row) => ({ feature: Number(row.dataset.feature), strength: Number($("input", row).value), mode: $("#mode").value }));
  const state = (text) => { $("#state").textContent = text; };
  const target = { baseline: $("#baseline"), steered: $("#steered") };
  let plotting = null, timer = 0;

  const address = (more = []) => {
    const chosen = [...edits().map((e) => `${e.feature}:${e.strength}`), ...more];
    const fields = { prompt: $("#prompt").value, features: chosen.join(","), mode: $("#mode").value, tokens: $("#tokens").value, temperature: $("#temperature").value, seed: $("#seed").value };
    const usual = { mode: "add", tokens: "40", temperature: "0", seed: "0" };
    return "/steer?" + new URLSearchParams(Object.entries(fields).filter(([name, value]) => value !== "" && value !== usual[name]));
  };
  const body = () => {
    const strong = edits().map((e) => (["add"].includes(e.mode) ? e : { ...e, strength: Math.max(-2, Math.min(2, e.strength)) }));
    return { prompt: $("#prompt").value, edits: strong };
  };

  async function plot() {
    plotting?.abort();
    plotting = new AbortController();
    if (!edits().length || $("#go").disabled) return;
    if (!$("#doses svg")) $("#doses").textContent = "the model is asked at each dose…";
    try {
      const answer = await post("/steer/doses", body(), plotting.signal);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      if (answer.ok) $("#doses").replaceChildren(...page.body.childNodes);
      else state($(".notice", page)?.textContent ?? "no plot");
    } catch { /* another one is on the way */ }
  }

  async function write() {
    history.replaceState(null, "", address());
    const asked = { ...body(), new_tokens: Number($("#tokens").value), temperature: Number($("#temperature").value), seed: Number($("#seed").value) };
    if (await writeBoth(asked, target, $("#stop"), state)) plot();
  }

  steer.addEventListener("submit", (event) => { event.preventDefault(); if (!$("#go").disabled) write(); });
  $("#stop").addEventListener("click", () => writing?.abort());
  steer.addEventListener("input", (event) => {
    if (event.target.type === "range") $("output", event.target.parentElement).textContent = event.target.value;
  });
  steer.addEventListener("change", (event) => {
    history.replaceState(null, "", address());
    clearTimeout(timer);
    if (event.target.type === "range" || event.target.id === "mode") timer = setTimeout(plot, 200);
  });
  steer.addEventListener("click", (event) => {
    if (!event.target.closest("[data-remove]")) return;
    event.target.closest(".edit").remove();
    history.replaceState(null, "", address());
    if (!edits().length) location.assign(address());
  });
  // words stand for the feature that a search by them finds first; the others are offered
  const found = async (words) => {
    const fields = { q: words, rows: 8, dictionary: steer.dataset.dictionary };
    const answer = await fetch("/api/v1/features?" + new URLSearchParams(fields));
    return answer.ok ? (await answer.json()).features : [];
  };
  const add = async () => {
    const text = $("#add").value.trim();
    if (!text) return;
    const feature = /^\d{1,10}$/.test(text) ? text : (await found(text))[0]?.feature;
    if (feature === undefined) state(`no feature is found by "${text}"`);
    else location.assign(address([`${feature}:0.4`]));
  };
  let looking = 0;
  $("#add").addEventListener("input", () => {
    clearTimeout(looking);
    const text = $("#add").value.trim();
    if (text.length < 2 || /^\d+$/.test(text)) return;
    looking = setTimeout(async () => {
      $("#add-found").replaceChildren(...(await found(text)).map((one) => Object.assign(document.createElement("option"), { value: one.feature, label: one.label })));
    }, 150);
  });
  $("#add-button").addEventListener("click", add);
  $("#add").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); add(); } });
}

const box = $("#steer-box");
if (box) {
  const strength = $("#steer-strength"), prompt = $("#steer-prompt");
  const state = (text) => { $("#steer-state").textContent = text; };
  const feature = box.dataset.feature ?? $("[name=features]", box).value;
  const changed = () => {
    $("output", box).textContent = strength.value;
    $("#steer-more").href = "/steer?" + new URLSearchParams({ prompt: prompt.value, features: `${feature}:${strength.value}` });
  };
  box.addEventListener("input", changed);
  changed(); // a browser may have kept what was typed
  if (box.dataset.feature) {
    box.addEventListener("submit", (event) => {
      event.preventDefault();
      $("#steer-texts").hidden = false;
      const asked = { prompt: prompt.value, edits: [{ feature: Number(feature), strength: Number(strength.value) }] };
      writeBoth(asked, { baseline: $("#box-baseline"), steered: $("#box-steered") }, $("#steer-stop"), state);
    });
    $("#steer-stop").addEventListener("click", () => writing?.abort());
  }
}
