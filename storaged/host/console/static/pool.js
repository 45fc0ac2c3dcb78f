// A pool's card: numbers, what the promise is worth, and how it went.

import { clock, duration, size } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const MOST_POINTS = 900;
const TONE = { normal: "good", low: "warn", critical: "bad", unknown: "soft" };
const LEVEL = { normal: "normal", low: "LOW", critical: "CRITICAL", unknown: "not known yet" };

export class PoolCard {
  constructor(template, name) {
    this.element = template.content.firstElementChild.cloneNode(true);
    this.points = [];
    const title = this.find("h3");
    title.id = `pool-${name}`;
    this.element.setAttribute("aria-labelledby", title.id);
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  remember(points) {
    this.points = points;
    this.draw();
  }

  update(pool, time, say) {
    this.find("h3").textContent = `${pool.name} (${pool.path})`;
    const level = this.find(".level");
    const text = `pressure ${LEVEL[pool.level]}`;
    if (level.textContent && level.textContent !== text) say(`Pool ${pool.name}: ${text}`);
    level.textContent = text;
    level.dataset.tone = TONE[pool.level];
    const problem = this.find(".problem");
    problem.hidden = !pool.unreadable;
    problem.textContent = pool.unreadable
      ? `The pool cannot be used: ${pool.unreadable}. Numbers from ${pool.seen_at ? clock(pool.seen_at) : "before"}.`
      : "";
    for (const cell of this.element.querySelectorAll("[data-field]")) cell.textContent = size(pool[cell.dataset.field]);
    this.find(".promise").textContent = promise(pool);
    if (pool.free !== null && !pool.unreadable && time - (this.points.at(-1)?.[0] ?? 0) >= 1) {
      this.points.push([time, pool.free, pool.reserve, pool.promised, pool.level]);
      if (this.points.length > MOST_POINTS) this.points.splice(1, 1);
      this.draw();
    }
  }

  draw() {
    const points = this.points;
    if (points.length < 2) return;
    const begin = points[0][0], span = points.at(-1)[0] - begin || 1;
    const most = Math.max(...points.map(([, free, reserve, promised]) => Math.max(free, reserve + promised))) * 1.05 || 1;
    const x = (time) => (((time - begin) / span) * 600).toFixed(1);
    const y = (value) => (94 - (value / most) * 92).toFixed(1);
    this.find("path.line").setAttribute("d", "M" + points.map((p) => `${x(p[0])} ${y(p[1])}`).join("L"));
    const top = points.map((p) => `${x(p[0])} ${y(p[2] + p[3])}`).join("L");
    this.find("path.area").setAttribute("d", `M0 94L${top}L600 94Z`);
    this.levels(points, x);
    this.find(".from").textContent = `${duration(span)} ago`;
    this.find(".most").textContent = `full height: ${size(most)}`;
    const free = points.map((p) => p[1]);
    this.find("svg").setAttribute(
      "aria-label",
      `Free space in the last ${duration(span)}: between ${size(Math.min(...free))} and ${size(Math.max(...free))}, now ${size(free.at(-1))}`,
    );
  }

  levels(points, x) {
    const runs = [];
    for (const [time, free, , , level] of points) {
      const last = runs.at(-1);
      if (last?.level === level) last.until = time;
      else {
        if (last) last.until = time;
        runs.push({ level, from: time, until: time, free });
      }
    }
    this.find(".levels").replaceChildren(
      ...runs.filter((run) => run.level === "low" || run.level === "critical").map((run) => {
        const strip = document.createElementNS(SVG, "rect");
        const width = Math.max(x(run.until) - x(run.from), 1);
        for (const [name, value] of Object.entries({ x: x(run.from), y: 95, width, height: 5, class: run.level }))
          strip.setAttribute(name, value);
        return strip;
      }),
    );
    const lines = runs.slice(-20).reverse().map((run) => `${clock(run.from)}: ${LEVEL[run.level]}, ${size(run.free)} free`);
    const list = this.find(".changes");
    if (list.textContent === lines.join("")) return;
    list.replaceChildren(...lines.map((line) => Object.assign(document.createElement("li"), { textContent: line })));
  }
}

function promise(pool) {
  const said = {
    true: "What guests may still write fits into what is free.",
    false: "What guests may still write does not fit into what is free: they are being told less. Free some space on the host.",
  }[pool.holds || (pool.unbound ? null : pool.holds)] ?? "Not all guests know their limit yet: room is set aside for them.";
  const soon = pool.exhausted_s !== null && pool.exhausted_s < 3600;
  return soon ? `${said} Free space falls by ${size(pool.falls)}/s: at that rate it lasts ${duration(pool.exhausted_s)}.` : said;
}
