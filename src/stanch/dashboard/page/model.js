// What was heard, kept apart by the process that said it: two workers are never drawn as one.

const KEPT = 300; // samples: five minutes
const HAPPENINGS = 200;
const WORKERS = 4;
export const COUNTS = ["in_use", "idle", "waiting", "bound"];

class Worker {
  constructor(facts) {
    this.facts = facts;
    this.heard = performance.now();
    this.databases = [];
    this.samples = new Map(); // by database: [{number, at, in_use, ...}]
    this.happenings = []; // the latest first
  }

  take(document) {
    this.facts = document.worker;
    this.heard = performance.now();
    this.databases = document.databases;
    for (const [name, columns] of Object.entries(document.samples)) {
      const kept = this.samples.get(name) ?? [];
      const last = kept.at(-1)?.number ?? 0;
      columns.number.forEach((number, row) => {
        if (number > last) kept.push(Object.fromEntries(Object.keys(columns).map((key) => [key, columns[key][row]])));
      });
      this.samples.set(name, kept.slice(-KEPT));
    }
  }

  note(happening) {
    const known = this.happenings.some(
      (other) => other.number === happening.number && other.database === happening.database,
    );
    if (known) return;
    this.happenings.unshift(happening);
    this.happenings.length = Math.min(this.happenings.length, HAPPENINGS);
  }
}

export class Model {
  workers = new Map(); // by run; the one heard last is the last
  #early = []; // happenings come before the snapshot that names their worker

  take(document) {
    const { run } = document.worker;
    const worker = this.workers.get(run) ?? new Worker(document.worker);
    const isNew = !this.workers.has(run);
    this.workers.delete(run);
    this.workers.set(run, worker);
    worker.take(document);
    for (const happening of this.#early.splice(0)) worker.note(happening);
    for (const old of [...this.workers.keys()].slice(0, -WORKERS)) this.workers.delete(old);
    return isNew;
  }

  note(happening) {
    this.#early.push(happening);
  }

  get live() {
    return [...this.workers.values()].at(-1);
  }
}

/** How many checkouts ended, per second, over the last few samples; null where there are too few. */
export function throughput(samples, over = 10) {
  const last = samples.at(-1);
  const first = samples.at(-1 - over) ?? samples[0];
  if (!last || last === first || last.at <= first.at) return null;
  return (last.taken - first.taken) / (last.at - first.at);
}

/** Columns for the chart, with a gap where nobody looked. */
export function columns(samples) {
  const drawn = [[], ...COUNTS.map(() => [])];
  let before = null;
  for (const sample of samples) {
    if (before !== null && sample.at - before > 3) {
      drawn[0].push(before + 1);
      COUNTS.forEach((_, index) => drawn[index + 1].push(null));
    }
    drawn[0].push(sample.at);
    COUNTS.forEach((count, index) => drawn[index + 1].push(sample[count]));
    before = sample.at;
  }
  return drawn;
}
