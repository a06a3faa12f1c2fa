// Draws what the feed tells. Everything drawn is of one process and one database, both named on the page.

import { Chart } from "./chart.js";
import { Feed } from "./feed.js";
import { atMost, clock, count, each, percent, plural, rate, seconds, span } from "./format.js";
import { Model, throughput } from "./model.js";
import { bar, drawing, element, mark, Table, write } from "./parts.js";

const find = (id) => document.getElementById(id);
const model = new Model();
const chosen = { run: null, database: null }; // null: the one heard now, the first
let isPaused = false;

// Tables ---------------------------------------------------------------------------------------------------

const STATES = { "running SQL": "●", "in use, no SQL running": "◐", "its task is gone": "✕" };
const share = (row) => (row.held > 0 ? row.sql_time / row.held : 0);
const sleeps = (row) => row.held >= 1 && share(row) < 0.1;

const holders = new Table(find("holders"), {
  caption: "Connections that are out now",
  sorted: "held",
  empty: "Nobody holds a connection now. Who does appears here, with the line that took it and where it stands.",
  key: (row, place) => `${row.holder}|${row.place}|${place}`,
  warns: (row) => (row.state === "its task is gone" ? "gone" : sleeps(row) ? "sleeps" : null),
  columns: [
    { name: "holder", label: "holder", kind: "code name", text: (row) => row.holder, sort: (row) => row.holder },
    { name: "place", label: "taken at", kind: "code", text: (row) => row.place, sort: (row) => row.place },
    { name: "held", label: "held", kind: "number", text: (row) => seconds(row.held), sort: (row) => row.held },
    {
      name: "share", label: "of that SQL", kind: "number", hint: "SQL running, as a share of the time held",
      draw: (cell, row) => bar(cell, share(row), percent(share(row))), sort: share,
    },
    {
      name: "statements", label: "statements", kind: "number",
      text: (row) => count(row.statements), sort: (row) => row.statements,
    },
    { name: "state", label: "state", text: (row) => `${STATES[row.state] ?? "○"} ${row.state}`, sort: (row) => row.state },
    { name: "now_at", label: "stands at", kind: "code", text: (row) => (row.now_at === row.state ? "–" : row.now_at) },
  ],
});

const leaks = new Table(find("leaks"), {
  caption: "Connections that were out for longer than leak_after",
  sorted: "at",
  empty: "No leak was found. A connection that is out for longer than leak_after is reported here once, by file and line.",
  key: (row) => `${row.at}|${row.place}|${row.holder}`,
  warns: (row) => (row.returned ? null : "gone"),
  columns: [
    { name: "at", label: "reported", kind: "number", text: (row) => clock(row.at), sort: (row) => row.at },
    { name: "place", label: "taken at", kind: "code name", text: (row) => row.place, sort: (row) => row.place },
    { name: "holder", label: "holder", kind: "code", text: (row) => row.holder, sort: (row) => row.holder },
    { name: "kind", label: "kind", text: (row) => row.kind, sort: (row) => row.kind },
    { name: "held", label: "held", kind: "number", text: (row) => seconds(row.held), sort: (row) => row.held },
    {
      name: "returned", label: "now",
      text: (row) => (!row.returned ? "✕ not back" : row.kind === "dropped unclosed" ? "✓ reclaimed" : "✓ came back"), sort: (row) => (row.returned ? 1 : 0),
    },
    { name: "now_at", label: "stood at", kind: "code", text: (row) => (!row.now_at || row.now_at === "its task is gone" ? "–" : row.now_at) },
  ],
});

const amount = (name, label, hint) => ({
  name, label, hint, kind: "number", text: (row) => count(row[name]), sort: (row) => row[name],
});
const length = (name, label, hint) => ({
  name, label, hint, kind: "number", text: (row) => seconds(row[name]), sort: (row) => row[name],
});
const mean = (name, label, total, units, show, hint) => ({
  name, label, hint, kind: "number",
  text: (row) => show(row[units] ? row[total] / row[units] : null), sort: (row) => (row[units] ? row[total] / row[units] : 0),
});

let poolTime = 0;
const routes = new Table(find("routes"), {
  caption: "What each route has cost since the start",
  sorted: "held",
  empty: "No unit of work has ended yet. Each route appears here with what it asked of the pool.",
  key: (row) => row.route,
  columns: [
    { name: "route", label: "route", kind: "code name", text: (row) => row.route, sort: (row) => row.route },
    {
      name: "held", label: "pool time", kind: "number", hint: "connections held, all units together",
      draw: (cell, row) => bar(cell, row.held / poolTime, seconds(row.held)), sort: (row) => row.held,
    },
    amount("units", "units", "requests, or whatever else opened a unit of work"),
    mean("mean", "per unit", "held", "units", seconds, "connections held, per unit"),
    length("sql_time", "SQL time"),
    length("waited", "waited", "for a connection, all units together"),
    {
      name: "statements", label: "statements/unit", kind: "number",
      text: (row) => each(row.statements, row.units), sort: (row) => row.statements / (row.units || 1),
    },
    amount("rolled_back", "rolled back"),
    {
      name: "repeated", label: "N+1", kind: "number", hint: "units in which one statement came suspiciously often",
      text: (row) => (row.repeated ? `▲ ${plural(row.repeated, "unit")}` : "–"), sort: (row) => row.repeated,
    },
  ],
});

const statements = new Table(find("statements"), {
  caption: "What each shape of statement has cost since the start",
  sorted: "total",
  empty: "No statement has ended yet. Each appears here by its shape, never with its values.",
  key: (row) => row.shape,
  columns: [
    { name: "shape", label: "shape", kind: "code wide", text: (row) => row.shape, sort: (row) => row.shape },
    length("total", "total", "all executions together"),
    amount("count", "executed", "the most frequent first"),
    mean("mean", "mean", "total", "count", seconds),
    length("longest", "slowest", "the slowest single execution"),
    { name: "place", label: "slowest at", kind: "code", text: (row) => row.place, sort: (row) => row.place },
    {
      name: "errors", label: "errors", kind: "number",
      text: (row) => (row.errors ? `✕ ${count(row.errors)}` : "–"), sort: (row) => row.errors,
    },
  ],
});

// Figures --------------------------------------------------------------------------------------------------

const tiles = Object.fromEntries(
  [
    ["in_use", "in use"],
    ["waiting", "waiting"],
    ["idle", "idle"],
    ["taken", "checkouts"],
    ["wait", "wait p99"],
    ["use", "held p99"],
    ["failed", "not served"],
    ["leaks", "leaks out"],
  ].map(([name, label]) => {
    const value = element("strong", { text: "–" });
    const note = element("small", { text: "\u00a0" });
    const tile = element("div", { classes: `tile ${name}` }, element("span", { text: label }), value, note);
    find("tiles").append(tile);
    return [name, { tile, value, note }];
  }),
);

function tile(name, value, note, warns = false) {
  write(tiles[name].value, value);
  write(tiles[name].note, note);
  mark(tiles[name].tile, "data-warns", warns ? "" : null);
}

const BOUNDS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60];

class Times {
  #cells = {};
  #bars;
  #note = element("p", { classes: "hint" });

  constructor(title) {
    const head = element("tr", {}, ...["", "p50", "p90", "p99", "number"].map((text) => element("th", { scope: "col", text })));
    const rows = ["last minute", "since the start"].map((text) => {
      const cells = ["p50", "p90", "p99", "count"].map((name) => {
        const cell = element("td", { classes: "number", text: "–" });
        this.#cells[`${text} ${name}`] = cell;
        return cell;
      });
      return element("tr", {}, element("th", { scope: "row", text }), ...cells);
    });
    this.#bars = [...BOUNDS, Infinity].map((_, place) =>
      drawing("rect", { x: place * 10 + 1, width: 8, y: 36, height: 0, rx: 1 }));
    const chart = drawing("svg", { viewBox: "0 0 170 37", preserveAspectRatio: "none", "aria-hidden": "true" }, ...this.#bars);
    const scale = element("p", { classes: "scale", "aria-hidden": "true" });
    for (const text of ["0.5 ms", "25 ms", "1 s", "60 s"]) scale.append(element("span", { text }));
    const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
    find("times").append(element("div", {}, element("h3", { text: title }), table, chart, scale, this.#note));
  }

  draw(recent, whole, note) {
    for (const [text, read] of [["last minute", recent], ["since the start", whole]]) {
      for (const name of ["p50", "p90", "p99"]) write(this.#cells[`${text} ${name}`], atMost(read?.[name]));
      write(this.#cells[`${text} count`], count(read?.count));
    }
    const buckets = recent?.count ? recent.buckets : [];
    const most = Math.max(1, ...buckets);
    this.#bars.forEach((rect, place) => {
      const hits = buckets[place] ?? 0;
      const height = hits ? Math.max(1.5, (hits / most) * 35) : 0.6;
      mark(rect, "y", (37 - height).toFixed(1));
      mark(rect, "height", height.toFixed(1));
      mark(rect, "class", hits ? "some" : "none");
    });
    write(this.#note, note);
  }
}

const waits = new Times("Waiting for a connection");
const uses = new Times("Holding one, from checkout to checkin");
const chart = new Chart(find("chart"), find("legend"));

// Drawing --------------------------------------------------------------------------------------------------

function draw() {
  const worker = model.workers.get(chosen.run) ?? model.live;
  if (!worker) return;
  const database = worker.databases.find(({ database: name }) => name === chosen.database) ?? worker.databases[0];
  drawChoices(worker, database);
  if (!database) return;
  const { stats, recent } = database;
  const samples = worker.samples.get(database.database) ?? [];
  const happenings = worker.happenings.filter((happening) => happening.database === database.database);
  const bound = stats.adopted ? stats.bound : null;

  tile("in_use", `${count(stats.in_use)} of ${count(bound)}`, stats.adopted ? poolOf(stats) : "the engine has a pool of its own",
    bound !== null && stats.in_use >= bound);
  tile("waiting", count(stats.waiting), stats.waiting ? "in the queue now" : "nobody in the queue", stats.waiting > 0);
  tile("idle", count(stats.idle), "open, ready for use");
  tile("taken", rate(throughput(samples)), "over ten seconds");
  tile("wait", atMost(recent.waits?.p99), "the last minute", (recent.waits?.p99 ?? 0) >= 1);
  tile("use", atMost(recent.uses?.p99), "the last minute");
  const { timeout, refused, unavailable, cancelled, served } = database.wait_ends;
  const failed = timeout + refused + unavailable;
  const why = told([timeout, "timed out"], [refused, "refused"], [unavailable, "server away"]);
  tile("failed", count(failed), why || "timeouts, refusals", failed > 0);
  const out = database.leaks.filter((leak) => !leak.returned).length;
  tile("leaks", count(out), `${count(database.leaks.length)} reported`, out > 0);

  chart.draw(samples, happenings);
  write(find("chart-hint"), `the last ${span(chart.span)}${happenings.length ? "; ▼ an event" : ""}`);
  holders.draw(database.holders);
  write(find("holders-hint"), database.holders.some(sleeps) ? "▲ held, but hardly any SQL: something else is waited for" : "");
  leaks.draw(database.leaks);
  mark(find("leaks-panel"), "data-warns", out ? "" : null);
  write(find("leaks-hint"), out ? `${plural(out, "connection")} not back` : "");
  waits.draw(recent.waits, database.waits,
    `since the start: ${told([served, "served"], [timeout, "timed out"], [refused, "refused"], [unavailable, "server away"], [cancelled, "cancelled"])}`);
  uses.draw(recent.uses, database.uses,
    `${plural(database.creates.count, "connection")} opened, each in ${atMost(database.creates.p99)} (p99)`);
  poolTime = Math.max(...database.routes.map((route) => route.held), 1e-9);
  routes.draw(database.routes);
  write(find("routes-hint"), some(database.routes.length, database.routes_in_all));
  statements.draw(database.statements);
  write(find("statements-hint"), some(database.statements.length, database.statements_in_all));
  drawEvents(happenings);
  document.title = `${stats.in_use}${bound === null ? "" : `/${bound}`} in use${out ? `, ${plural(out, "leak")}` : ""} · stanch`;
}

function poolOf({ pool_size, max_overflow, readers }) {
  const overflow = max_overflow ? ` + ${count(max_overflow)} overflow` : "";
  return `pool of ${count(pool_size)}${overflow}${readers ? `, ${count(readers.bound)} for readers` : ""}`;
}

const told = (...ends) => ends.filter(([number]) => number).map(([number, word]) => `${count(number)} ${word}`).join(", ");
const some = (shown, all) => (shown < all ? `the most telling ${count(shown)} of ${count(all)}, since the start` : "since the start");

const drawn = new Map();
const SIGNS = { INFO: "·", WARNING: "▲", ERROR: "✕" };

function drawEvents(happenings) {
  const list = find("events");
  const latest = happenings.slice(0, 50);
  const kept = new Set();
  latest.forEach((happening, place) => {
    const key = `${chosen.run}|${happening.database}|${happening.number}|${happening.at}`;
    kept.add(key);
    let line = drawn.get(key);
    if (!line) {
      const facts = Object.entries(happening.facts).map(([name, fact]) => `${name}: ${[fact].flat().join(", ")}`);
      line = element(
        "li", { "data-level": happening.level },
        element("time", { text: clock(happening.at), datetime: new Date(happening.at * 1000).toISOString() }),
        element("span", { classes: "sign", text: SIGNS[happening.level] ?? "·", "aria-label": happening.level.toLowerCase() }),
        element("b", { text: happening.kind }),
        element("span", { classes: "told", text: happening.text }),
      );
      line.title = facts.join("\n");
      drawn.set(key, line);
    }
    if (list.children[place] !== line) list.insertBefore(line, list.children[place] ?? null);
  });
  for (const [key, line] of drawn) {
    if (!kept.has(key)) {
      line.remove();
      drawn.delete(key);
    }
  }
  mark(find("events-empty"), "hidden", latest.length ? "" : null);
  write(find("events-hint"), latest.length ? "the latest first" : "");
}

/** Which database, and which worker. A choice is offered only where there is one. */
function drawChoices(worker, database) {
  const names = worker.databases.map(({ database: name }) => name);
  choices(find("databases"), names.length > 1 || names[0] !== "main" ? names : [], database?.database, (name) => (chosen.database = name));

  write(find("of-worker"), `worker ${worker.facts.pid}`);
  const { pid, since, at } = worker.facts;
  const isLive = worker === model.live;
  write(find("worker"), isLive
    ? `Worker ${pid}, for ${span(at - since)}. One process alone is shown: if the app has other workers, they are not in these numbers.`
    : `Worker ${pid}, as it was at ${clock(at)}. It is not connected any more.`);
  const runs = [...model.workers];
  mark(find("workers"), "hidden", runs.length > 1 ? null : "");
  choices(find("workers"), runs.length > 1 ? runs.map(([run]) => run) : [], worker.facts.run,
    (run) => (chosen.run = run === model.live.facts.run ? null : run),
    (run) => {
      const known = model.workers.get(run);
      return `worker ${known.facts.pid}${known === model.live ? ", now" : `, until ${clock(known.facts.at)}`}`;
    });
}

function choices(place, keys, current, choose, label = (key) => key) {
  const buttons = new Map([...place.children].map((button) => [button.dataset.key, button]));
  for (const key of keys) {
    let button = buttons.get(key);
    buttons.delete(key);
    if (!button) {
      button = element("button", { type: "button", "data-key": key });
      button.addEventListener("click", () => {
        choose(key);
        draw();
      });
      place.append(button);
    }
    write(button, label(key));
    mark(button, "aria-current", key === current ? "true" : null);
  }
  for (const button of buttons.values()) button.remove();
}

// Listening ------------------------------------------------------------------------------------------------

let notified = 0;

function notify(text) {
  const notice = find("notice");
  write(notice, text);
  notice.hidden = false;
  clearTimeout(notified);
  notified = setTimeout(() => (notice.hidden = true), 20_000);
}

const feed = {
  snapshot(document_) {
    const before = model.live;
    if (model.take(document_) && before) {
      notify(`Now connected to worker ${document_.worker.pid}; before it was ${before.facts.pid}. Their numbers are kept apart, see below.`);
    }
    if (!isPaused) draw();
  },
  happening(happening) {
    model.note(happening);
  },
  state(name, text, silence = 0) {
    const isStill = isPaused && (name === "live" || name === "polling");
    mark(find("link"), "data-state", isStill ? "paused" : name);
    write(find("link-text"), isStill ? "paused" : text);
    mark(document.body, "data-lost", name === "lost" || name === "refused" ? "" : null);
    find("link").title = silence ? `for ${span(silence)}` : "";
  },
};

find("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  mark(find("pause"), "aria-pressed", String(isPaused));
  write(find("pause"), isPaused ? "Go on" : "Pause");
  feed.state("live", "live");
  if (!isPaused) draw();
});

// Light or dark --------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
const KEY = "stanch-theme"; // the one thing that is remembered

function remembered() {
  try {
    const theme = localStorage.getItem(KEY);
    return THEMES.includes(theme) ? theme : "auto";
  } catch {
    return "auto";
  }
}

function paint(theme) {
  mark(document.documentElement, "data-theme", theme);
  write(find("theme"), `Theme: ${theme}`);
  chart.paint();
}

find("theme").addEventListener("click", () => {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    // Then it holds until the page is left.
  }
  paint(theme);
});

paint(remembered());
new Feed(feed);
