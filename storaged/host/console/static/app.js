// The page: what is known, the cards that show it, and what is said when the line is dead.

import { listen, post, session } from "./api.js";
import { clock, duration } from "./format.js";
import { GuestCard } from "./guest.js";
import { PoolCard } from "./pool.js";

const by = (id) => document.getElementById(id);
const pools = new Map(), guests = new Map(), known = new Map();
const FILTER_FROM = 9;
let said = { time: null, lost: "" };
let silentSince = null, silentWhy = "";
let connected = false;

function say(text) {
  by("said").textContent = text;
}

function heard(event) {
  const first = !connected;
  connected = true;
  silentSince = null;
  if (!event.beat) {
    said = event;
    show(event);
  }
  status();
  if (first) by("console").hidden = false;
}

function show(event) {
  if (event.whole) known.clear();
  for (const guest of event.guests) known.set(guest.name, guest);
  for (const name of event.gone ?? []) known.delete(name);
  place(pools, by("pools"), event.pools.map((pool) => pool.name), (name) => new PoolCard(by("pool"), name));
  for (const pool of event.pools) {
    const card = pools.get(pool.name);
    if (event.whole && event.history[pool.name]) card.remember(event.history[pool.name]);
    if (!event.lost) card.update(pool, event.time, say);
  }
  place(guests, by("list"), [...known.keys()].sort(), (name) => new GuestCard(by("guest"), name, say));
  const jobs = new Map();
  for (const job of event.resizes) if (!jobs.has(job.guest)) jobs.set(job.guest, job);
  const poolOf = new Map(event.pools.map((pool) => [pool.name, pool]));
  for (const [name, card] of guests) {
    const guest = known.get(name);
    card.update(guest, poolOf.get(guest.pool));
    card.follow(jobs.get(name));
  }
  by("search").hidden = known.size < FILTER_FROM;
  filter();
}

// Cards in the order of `names`; those that stay are not touched, so that nobody loses the focus.
function place(cards, list, names, make) {
  const wanted = new Set(names);
  for (const [name, card] of cards) {
    if (wanted.has(name)) continue;
    card.element.remove();
    cards.delete(name);
  }
  names.forEach((name, index) => {
    if (!cards.has(name)) cards.set(name, make(name));
    const { element } = cards.get(name);
    if (list.children[index] !== element) list.insertBefore(element, list.children[index] ?? null);
  });
}

function filter() {
  const text = by("filter").value.trim().toLowerCase();
  let shown = 0;
  for (const [name, card] of guests) {
    card.element.hidden = !by("search").hidden && !name.toLowerCase().includes(text);
    shown += card.element.hidden ? 0 : 1;
  }
  by("none").hidden = shown > 0;
  by("none").textContent = known.size
    ? "No guest has such a name."
    : "No guest is known: name them in the configuration, [guest.NAME], or let them announce themselves, [discovery].";
}

// Old numbers are said to be old, and nothing can be asked for until they are new again.
function status() {
  const since = said.time === null ? "" : `from ${clock(said.time)}`;
  const why = silentSince !== null
    ? silentWhy || "the console does not answer: is storaged-host running, and the network up?"
    : said.lost;
  const banner = by("lost");
  const text = why ? `${since ? `These numbers are old, ${since}: ` : ""}${why}. Trying again every few seconds.`.replace(/[?.]\./, "? ") : "";
  if (Boolean(banner.textContent) !== Boolean(text) || why !== status.why) {
    banner.textContent = text;
    banner.hidden = !text;
    for (const card of guests.values()) card.silence(Boolean(text));
    for (const card of pools.values()) card.element.classList.toggle("lost", Boolean(text));
  }
  status.why = why;
  const age = said.time === null ? "" : `, for ${duration(Math.max(Date.now() / 1000 - said.time, 0))}`;
  by("news").textContent = why ? `Not live${age}` : `Live, ${known.size} guests, version ${said.version}`;
  document.title = why ? "(old) storaged" : "storaged";
}

function start() {
  listen({
    heard,
    silent: (why = "") => {
      silentSince ??= Date.now();
      silentWhy = why;
      status();
    },
    stranger: signIn,
  });
}

function signIn(session) {
  if (!session.by_token) return location.reload(); // to the page that says how
  by("console").hidden = true;
  by("login").hidden = false;
  by("news").textContent = "Signed out";
  by("token").focus();
}

by("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const problem = by("login").querySelector(".problem");
  problem.textContent = "";
  try {
    await session();
    await post("/api/login", { token: by("token").value });
  } catch (error) {
    problem.textContent = error.message;
    return;
  }
  by("token").value = "";
  by("login").hidden = true;
  connected = false;
  await leave();
  start();
});

async function leave() {
  try {
    by("logout").hidden = !(await session()).logout;
  } catch {
    // The stream says what is wrong.
  }
}

by("logout").addEventListener("click", async () => {
  await post("/api/logout").catch(() => {});
  location.reload();
});
by("filter").addEventListener("input", filter);
setInterval(status, 1000);
leave();
start();
