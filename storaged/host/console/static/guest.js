// A guest's card: where its disk's bytes are, its resize, and the slider.

import { post } from "./api.js";
import { clock, duration, MIB, parse, size } from "./format.js";

const STATE = {
  up: ["running", "good"], hanging: ["does not answer", "bad"], suspended: ["suspended", "warn"],
  discovered: ["starting", "warn"], configured: ["not running", "soft"], gone: ["ended", "soft"], unknown: ["not known", "soft"],
};
const STAGE = {
  preparing: "preparing", image: "changing the image", capacity: "waiting until the guest sees its new disk",
  balloon: "the balloon makes way", filesystem: "resizing the filesystem", verifying: "checking the result",
  restoring: "taking back what was begun", ended: "ended", unknown: "starting",
};

// A button that has the focus must not lose it by being disabled: it stays, says so, and does nothing.
function enable(button, can) {
  button.setAttribute("aria-disabled", String(!can));
}

function enabled(button) {
  return button.getAttribute("aria-disabled") !== "true";
}

export class GuestCard {
  constructor(template, name, say) {
    this.element = template.content.firstElementChild.cloneNode(true);
    this.name = name;
    this.say = say;
    this.target = null; // what the person chose; null: nothing yet
    this.lost = false;
    const title = this.find("h3");
    title.textContent = name;
    title.tabIndex = -1; // where the focus goes when what had it is gone
    title.id = `guest-${name}`;
    this.element.setAttribute("aria-labelledby", title.id);
    this.find("summary").textContent = `Resize ${name}`;
    this.find(".cancel").textContent = `Cancel the resize of ${name}`;
    this.find("progress").setAttribute("aria-label", `Resize of ${name}`);
    for (const [label, input] of [[".range-label", ".slider"], [".exact-label", ".exact"]]) {
      this.find(input).id = this.find(label).htmlFor = `${input.slice(1)}-${name}`;
    }
    this.find(".exact").setAttribute("aria-label", `or exactly, the new size of ${name}`);
    this.find(".slider").addEventListener("input", (event) => this.choose(this.at(Number(event.target.value))));
    this.find(".exact").addEventListener("input", (event) => this.type(event.target.value));
    this.find("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.begin();
    });
    this.find(".allow").addEventListener("change", () => this.effect());
    this.find(".cancel").addEventListener("click", () => this.cancel());
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  update(guest, pool) {
    this.guest = guest;
    this.pool = pool;
    const [word, tone] = guest.fenced ? ["fenced", "bad"] : STATE[guest.state];
    const badge = this.find(".state");
    badge.textContent = word;
    badge.dataset.tone = tone;
    badge.title = guest.fenced
      ? `It exceeded its grant and is granted nothing: storagectl unfence ${guest.name}`
      : guest.unproven && `It may write more than is known: ${guest.unproven}`;
    this.find(".where").textContent = guest.writes >= MIB ? `writes ${size(guest.writes)}/s` : "";
    this.element.classList.toggle("stale", Boolean(guest.stale));
    const old = this.find(".old");
    old.hidden = !guest.stale;
    const since = guest.reported_at === null ? "It has told nothing yet" : `The guest's numbers are from ${clock(guest.reported_at)}`;
    old.textContent = guest.stale ? `${since}: ${guest.stale}.` : "";
    const whole = guest.size ?? guest.logical;
    const held = guest.balloon ?? 0, free = guest.available ?? 0;
    const shown = { ...guest, size: whole };
    for (const cell of this.element.querySelectorAll("[data-field]")) cell.textContent = size(shown[cell.dataset.field]);
    const used = guest.available === null ? guest.cost : Math.max(whole - held - free, 0);
    for (const [part, value] of [["used", used], ["balloon", held], ["free", free]])
      this.find(`.bar .${part}`).style.width = `${(100 * value) / Math.max(whole, used + held + free, 1)}%`;
    this.find(".bar").setAttribute(
      "aria-label", `${size(whole)}: ${size(used)} in use, ${size(held)} balloon, ${size(guest.available)} available`,
    );
    const cannot = this.find(".cannot");
    cannot.hidden = guest.resizable;
    cannot.textContent = guest.resizable ? "" : `It cannot be resized now: ${guest.not_resizable || "why is not known"}.`;
    this.bounds();
  }

  // `job`: the newest resize of this guest, or undefined.
  follow(job) {
    const runs = job && (job.state === "running" || job.state === "cancelling");
    if (job && this.job && job.id === this.job.id && job.state !== this.job.state) this.say(outcome(job));
    this.job = job;
    if (!runs && this.find(".job").contains(document.activeElement)) this.find("h3").focus();
    this.find(".job").hidden = !runs;
    const ended = this.find(".ended");
    ended.hidden = !job || runs;
    if (runs) {
      const verb = job.to < job.from ? "Shrinking" : "Growing";
      this.find(".what").textContent = `${verb} from ${size(job.from)} to ${size(job.to)}`;
      const bar = this.find("progress");
      bar.value = job.progress;
      this.find(".how").textContent = how(job);
      enable(this.find(".cancel"), !this.lost && job.state !== "cancelling");
    } else {
      if (this.find(".job .problem").textContent) this.find(".job .problem").textContent = "";
      if (job) {
        ended.textContent = outcome(job) + (job.ended_at ? ` (${clock(job.ended_at)})` : "");
        ended.dataset.tone = job.state === "failed" ? "bad" : "";
      }
    }
    const form = this.find(".resize");
    const hide = Boolean(runs) || !this.guest.resizable || this.least === null;
    if (hide && form.contains(document.activeElement)) (runs ? this.find(".cancel") : this.find("h3")).focus();
    form.hidden = hide;
    if (hide) form.open = false;
  }

  silence(lost) {
    this.lost = lost;
    this.element.classList.toggle("lost", lost);
    enable(this.find(".cancel"), !lost && this.job?.state !== "cancelling");
    this.effect();
  }

  // --- the slider: its steps are whole multiples of a round size, its ends the bounds themselves

  bounds() {
    const { guest, pool } = this;
    this.now = guest.size ?? guest.logical;
    this.least = guest.minimum || null;
    if (this.least === null) return;
    this.least = Math.min(Math.ceil(this.least / MIB) * MIB, this.now);
    const spare = pool && pool.free !== null ? Math.max(pool.free - pool.reserve, 0) : 0;
    if (this.target === null || this.most === undefined) this.most = Math.floor((this.now + spare) / MIB) * MIB;
    this.most = Math.max(this.most, this.now);
    if (this.target !== null && !this.typed) this.target = Math.max(this.target, this.least); // which moves as it writes
    this.step = Math.max(2 ** Math.floor(Math.log2((this.most - this.least) / 100 || 1)), MIB);
    const slider = this.find(".slider");
    slider.min = 0;
    slider.step = 1;
    slider.max = Math.max(Math.ceil(this.most / this.step) - Math.floor(this.least / this.step), 1);
    if (document.activeElement !== slider) slider.value = this.index(this.target ?? this.now);
    this.find(".least").textContent = `least ${size(this.least)}`;
    this.find(".most").textContent = `room for ${size(this.most)}`;
    const easy = guest.guaranteed ?? 0;
    const marked = easy > this.least && easy < this.now, tick = this.find(".tick");
    tick.hidden = !marked;
    // The thumb is 16 px wide, and its middle does not reach the ends.
    const share = this.index(easy) / slider.max;
    tick.style.left = `calc(${100 * share}% + ${8 - 16 * share - 1}px)`;
    this.find(".mark").textContent = (marked
      ? `Down to ${size(easy)} (the mark) no data has to be moved; below that it takes time. ` : "") + (guest.minimum_why ? `${guest.minimum_why}.` : "");
    this.effect();
  }

  at(index) {
    if (index <= 0) return this.least;
    return Math.min((Math.floor(this.least / this.step) + index) * this.step, this.most);
  }

  index(bytes) {
    return bytes <= this.least ? 0 : Math.round(bytes / this.step - Math.floor(this.least / this.step));
  }

  choose(bytes) {
    this.target = bytes;
    this.typed = false;
    this.find(".exact").value = "";
    this.find("form .problem").textContent = "";
    this.effect();
  }

  type(text) {
    const bytes = parse(text);
    this.target = bytes;
    this.typed = true;
    this.find("form .problem").textContent =
      text.trim() && bytes === null ? "That is not a size: write 20G, 1.5T or 512MiB." :
      bytes !== null && bytes < this.least ? `It cannot be smaller than ${size(this.least)}.` : "";
    if (bytes !== null) this.find(".slider").value = this.index(bytes);
    this.effect();
  }

  effect() {
    if (this.least === null || this.least === undefined) return;
    const target = this.target ?? this.now, by = target - this.now;
    const [verb, text] = effect(this.guest, this.now, target, this.most, this.pool);
    this.find("output").textContent = size(target);
    this.find(".effect").textContent = text;
    this.find(".slider").setAttribute("aria-valuetext", by === 0 ? `${size(target)}, as now` : `${size(target)}, ${text}`);
    const over = this.over(target);
    this.find(".over").hidden = !over;
    this.find(".over span").textContent = over;
    if (!over) this.find(".allow").checked = false;
    const button = this.find("form button");
    button.textContent = by === 0 ? `Choose another size for ${this.name}` : `${verb} ${this.name} to ${size(target)}`;
    enable(button, !this.lost && !this.asking && by !== 0 && target >= this.least && (!over || this.find(".allow").checked));
  }

  // What a person has to agree to when the pool's guests would be promised more than its limit; empty when they would not.
  over(target) {
    const { guest, pool } = this;
    const has = Math.max(guest.logical, this.now);
    if (!pool || pool.sizes_limit === null || target <= has) return "";
    const sum = pool.sizes - has + target;
    if (sum <= pool.sizes_limit) return "";
    return `All guests of ${pool.name} would be promised ${size(sum)}; its limit is ${size(pool.sizes_limit)}. Promise more all the same`;
  }

  async begin() {
    const problem = this.find("form .problem");
    problem.textContent = "";
    if (!enabled(this.find("form button"))) return;
    this.asking = true;
    enable(this.find("form button"), false);
    try {
      const job = await post(`/api/guests/${encodeURIComponent(this.name)}/resize`, { size: this.target, allow_overcommit: this.find(".allow").checked });
      this.target = null;
      this.find(".exact").value = "";
      this.say(`The resize of ${this.name} to ${size(job.to)} has begun`);
      this.follow(job);
    } catch (error) {
      problem.textContent = error.message;
    }
    this.asking = false;
    this.effect();
  }

  async cancel() {
    const problem = this.find(".job .problem");
    problem.textContent = "";
    if (!enabled(this.find(".cancel"))) return;
    enable(this.find(".cancel"), false);
    this.say(`Cancelling the resize of ${this.name}`); // before its end can be heard of
    try {
      await post(`/api/guests/${encodeURIComponent(this.name)}/cancel`, { id: this.job?.id ?? "" });
    } catch (error) {
      problem.textContent = error.message;
      enable(this.find(".cancel"), true);
    }
  }
}

function effect(guest, now, target, most, pool) {
  const by = target - now;
  if (by === 0) return ["", `${size(now)} is what it has now.`];
  if (by < 0) {
    const used = Math.max(now - (guest.balloon ?? 0) - (guest.available ?? 0), 0);
    const stored = Math.min(Math.max(guest.cost - used, guest.cost - target, 0), -by);
    const kind = stored > MIB ? `up to ${size(stored)} of it is stored on the host now` : "it was promised, and is not stored there now";
    return ["Shrink", `Returns ${size(-by)} to the host: ${kind}.`];
  }
  if (target > most)
    return ["Grow", `Takes up to ${size(by)} from the host, which has ${size(most - now)} to spare: the guest cannot fill it until space is freed.`];
  return ["Grow", `Takes up to ${size(by)} from the host, as the guest writes.${pool?.level === "critical" ? " The host is nearly full." : ""}`];
}

function how(job) {
  const parts = [`${Math.floor(job.progress * 100)} %`, job.state === "cancelling" ? "cancelling" : STAGE[job.stage]];
  if (job.rate) parts.push(`${size(job.rate)}/s`);
  if (job.eta_s !== null) parts.push(`${duration(job.eta_s)} left`);
  if (job.reason) parts.push(job.reason);
  return parts.join(", ");
}

function outcome(job) {
  const at = job.filesystem === null ? "" : `; it has ${size(job.filesystem)}`;
  const why = job.reason ? `: ${job.reason}` : "";
  if (job.state === "done") return `${job.guest} was resized from ${size(job.from)} to ${size(job.to)}`;
  if (job.state === "cancelled") return `The resize of ${job.guest} to ${size(job.to)} was cancelled${at}`;
  if (job.state === "failed") return `The resize of ${job.guest} to ${size(job.to)} failed${why}${at}`;
  return `The resize of ${job.guest} to ${size(job.to)} is ${job.state}`;
}
