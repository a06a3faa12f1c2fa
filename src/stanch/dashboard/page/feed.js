// Listens to the server, and says how that goes. EventSource comes back by itself, with the id of what it heard last;
// where it gives up (somebody else answered, too many watch), a snapshot is asked for every few seconds instead.

const SILENT = 4000; // milliseconds without news after which somebody should know
const AGAIN = 3000;
const HIDDEN = 30_000; // a page that nobody looks at leaves its place to others

export class Feed {
  #source = null;
  #heard = performance.now();
  #retry = 0;
  #hide = 0;
  #reader;

  /** `reader` has snapshot(document), happening(event) and state(name, text). */
  constructor(reader) {
    this.#reader = reader;
    setInterval(() => this.#watch(), 1000);
    document.addEventListener("visibilitychange", () => this.#visibility());
    this.#listen();
  }

  #listen() {
    this.#source?.close();
    const source = new EventSource("feed");
    this.#source = source;
    source.addEventListener("snapshot", (message) => {
      this.#news("live", "live");
      this.#reader.snapshot(JSON.parse(message.data));
    });
    source.addEventListener("happening", (message) => this.#reader.happening(JSON.parse(message.data)));
    source.addEventListener("error", () => {
      // Otherwise it comes back by itself: each turn of the feed ends after a while.
      if (source.readyState === EventSource.CLOSED && source === this.#source) this.#poll();
    });
  }

  async #poll() {
    this.#source = null;
    clearTimeout(this.#retry);
    let refused = false;
    try {
      const reply = await fetch("snapshot", { cache: "no-store" });
      if (reply.ok) {
        const whole = await reply.json();
        this.#news("polling", "live, every few seconds: too many are watching");
        for (const happening of whole.happenings) this.#reader.happening(happening);
        this.#reader.snapshot(whole);
      } else if (reply.status === 401 || reply.status === 403) {
        refused = true;
        this.#reader.state("refused", `you are no longer let in (${reply.status}); reload the page`);
      }
    } catch {
      // The server is away; #watch says so.
    }
    if (!document.hidden) this.#retry = setTimeout(() => this.#listen(), refused ? 10 * AGAIN : AGAIN);
  }

  #news(state, text) {
    this.#heard = performance.now();
    this.#reader.state(state, text);
  }

  #watch() {
    const silence = performance.now() - this.#heard;
    if (silence < SILENT || document.hidden) return;
    this.#reader.state("lost", "no answer, reconnecting", Math.round(silence / 1000));
    // A connection through something that went to sleep may stay open for ever, and say nothing.
    if (silence > 5 * SILENT && this.#source) {
      this.#heard = performance.now() - SILENT;
      this.#listen();
    }
  }

  #visibility() {
    clearTimeout(this.#hide);
    if (document.hidden) {
      this.#hide = setTimeout(() => {
        clearTimeout(this.#retry);
        this.#source?.close();
        this.#source = null;
      }, HIDDEN);
    } else if (this.#source === null) {
      this.#listen();
    }
  }
}
