// The live chart. A series is told from another by its dash and width as well as by its colour, in the chart and in the
// legend, whose swatches the chart takes its colours from: so both always agree, in light and in dark.

import { COUNTS, columns } from "./model.js";
import { clock, span } from "./format.js";
import { drawing, element, mark, write } from "./parts.js";

const SPANS = [60, 300]; // seconds: at least and at most; between them as long as there is something to see
const HEIGHT = 232;
const LOOKS = {
  in_use: { label: "in use", dash: [], width: 2.5, fill: true },
  idle: { label: "idle", dash: [7, 4], width: 1.5 },
  waiting: { label: "waiting", dash: [2, 3], width: 3 },
  bound: { label: "pool bound", dash: [14, 3, 2, 3], width: 1.25 },
};
const FONT = "11px system-ui, sans-serif";

export class Chart {
  #plot = null;
  #place;
  #swatches = {};
  #values = {};
  #samples = [];
  #marks = [];

  constructor(place, legend) {
    this.#place = place;
    for (const count of COUNTS) {
      const { label, dash, width } = LOOKS[count];
      const line = drawing("line", {
        x1: 1, y1: 6, x2: 29, y2: 6, "stroke-width": width, "stroke-dasharray": dash.join(" "), "stroke-linecap": "butt",
      });
      const swatch = drawing("svg", { viewBox: "0 0 30 12", width: 30, height: 12, "aria-hidden": "true" }, line);
      this.#swatches[count] = swatch;
      this.#values[count] = element("b");
      const item = element("li", { classes: `series ${count}` });
      item.append(swatch, element("span", { text: label }), this.#values[count]);
      legend.append(item);
    }
    new ResizeObserver(() => this.#resize()).observe(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paint());
  }

  /** How many seconds are shown. */
  get span() {
    const known = this.#samples.length ? this.#samples.at(-1).at - this.#samples[0].at : 0;
    return Math.min(SPANS[1], Math.max(SPANS[0], Math.ceil(known / 10) * 10));
  }

  draw(samples, happenings) {
    this.#samples = samples;
    this.#marks = happenings.filter((happening) => happening.level !== "INFO");
    const data = columns(samples);
    if (this.#plot === null) this.#make(data);
    else this.#plot.setData(data);
    this.#tell();
  }

  /** Draws anew, in the colours of now. */
  paint() {
    this.#plot?.redraw(false, true);
  }

  #colour(of) {
    return getComputedStyle(of).color;
  }

  #ink(name) {
    return this.#colour(this.#place.parentElement.querySelector(name) ?? this.#place);
  }

  #make(data) {
    const grid = { stroke: () => this.#colour(this.#place).replace(/^rgb\((.+)\)$/, "rgba($1, 0.14)"), width: 1 };
    const axis = { stroke: () => this.#ink(".hint"), font: FONT, grid, ticks: { show: false }, gap: 6 };
    const series = COUNTS.map((count) => {
      const { dash, width, fill } = LOOKS[count];
      const colour = () => this.#colour(this.#swatches[count]);
      return {
        stroke: colour,
        fill: fill ? () => colour().replace(/^rgb\((.+)\)$/, "rgba($1, 0.12)") : undefined,
        dash,
        width,
        cap: "butt",
        points: { show: false },
        paths: window.uPlot.paths.stepped({ align: 1 }),
      };
    });
    this.#plot = new window.uPlot(
      {
        width: Math.max(200, this.#place.clientWidth),
        height: HEIGHT,
        legend: { show: false },
        padding: [14, 6, 0, 0],
        cursor: { y: false, drag: { setScale: false, x: false, y: false }, points: { size: 7 } },
        scales: {
          x: { range: (_, __, max) => [(max ?? Date.now() / 1000) - this.span, max ?? Date.now() / 1000] },
          y: { range: (_, __, max) => [0, Math.max(2, (max ?? 0) * 1.08)] },
        },
        axes: [
          { ...axis, space: 90, size: 28, values: (_, ticks) => ticks.map(clock), incrs: [10, 15, 30, 60, 120] },
          { ...axis, space: 36, size: 40, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000] },
        ],
        series: [{}, ...series],
        hooks: { setCursor: [() => this.#tell()], draw: [(plot) => this.#drawMarks(plot)] },
      },
      data,
      this.#place,
    );
  }

  #resize() {
    const width = Math.max(200, this.#place.clientWidth);
    if (this.#plot && this.#plot.width !== width) this.#plot.setSize({ width, height: HEIGHT });
  }

  /** What happened, where it happened: a triangle above the curve, and a line down to the axis. */
  #drawMarks(plot) {
    const { ctx, bbox } = plot;
    const scale = window.devicePixelRatio || 1;
    ctx.save();
    for (const { at, level } of this.#marks) {
      const x = Math.round(plot.valToPos(at, "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.fillStyle = ctx.strokeStyle = this.#colour(this.#swatches[level === "ERROR" ? "waiting" : "bound"]);
      ctx.lineWidth = scale;
      ctx.setLineDash([scale, 3 * scale]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.beginPath();
      ctx.moveTo(x - 5 * scale, bbox.top - 9 * scale);
      ctx.lineTo(x + 5 * scale, bbox.top - 9 * scale);
      ctx.lineTo(x, bbox.top - scale);
      ctx.fill();
    }
    ctx.restore();
  }

  /** The legend shows the values under the cursor, else the latest. */
  #tell() {
    const index = this.#plot?.cursor.idx;
    const latest = this.#samples.at(-1);
    for (const [place, count] of COUNTS.entries()) {
      const value = index === null || index === undefined ? latest?.[count] : this.#plot.data[place + 1][index];
      write(this.#values[count], value === null || value === undefined ? "–" : String(value));
    }
    if (!latest) return;
    const most = (count) => Math.max(...this.#samples.map((sample) => sample[count]));
    mark(
      this.#place,
      "aria-label",
      `Now in use ${latest.in_use}, idle ${latest.idle}, waiting ${latest.waiting}, of at most ${latest.bound}.` +
        ` In the last ${span(this.span)} at most ${most("in_use")} in use and ${most("waiting")} waiting.`,
    );
  }
}
