// Numbers for people: always with their unit, and as many digits as somebody can use.

const NONE = "–";
const WHOLE = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export function count(number) {
  return number === null || number === undefined ? NONE : WHOLE.format(number);
}

/** Three digits: 4.12, 41.2, 412. */
function digits(number) {
  return number.toFixed(number >= 99.95 ? 0 : number >= 9.995 ? 1 : 2);
}

export function seconds(length) {
  if (length === null || length === undefined) return NONE;
  if (length === 0) return "0 s";
  if (length < 0.000_999_5) return `${digits(length * 1e6)} µs`;
  if (length < 0.999_5) return `${digits(length * 1e3)} ms`;
  if (length < 99.95) return `${digits(length)} s`;
  return span(length);
}

/** A length of time that people count in minutes or days: 3 min 20 s, 2 h 14 min, 3 d 4 h. */
export function span(length) {
  const whole = Math.max(0, Math.round(length));
  if (whole < 60) return `${whole} s`;
  const [unit, name, below, small] =
    whole < 3600 ? [60, "min", 1, "s"] : whole < 86_400 ? [3600, "h", 60, "min"] : [86_400, "d", 3600, "h"];
  const rest = Math.floor((whole % unit) / below);
  return `${WHOLE.format(Math.floor(whole / unit))} ${name}${rest ? ` ${rest} ${small}` : ""}`;
}

/** A quantile of a histogram: the bound that so many stayed below. 0.0005 is written as 0.5 ms, not as 500 µs. */
export function atMost(bound) {
  if (bound === null || bound === undefined) return NONE;
  return bound < 1 ? `≤ ${bound * 1000} ms` : `≤ ${bound} s`;
}

export function rate(perSecond) {
  if (perSecond === null || perSecond === undefined) return NONE;
  return `${perSecond === 0 ? "0" : perSecond >= 99.5 ? WHOLE.format(perSecond) : perSecond.toFixed(1)} /s`;
}

export function percent(share) {
  if (share === null || !Number.isFinite(share)) return NONE;
  const hundredths = Math.min(100, share * 100);
  return `${hundredths > 0 && hundredths < 9.95 ? hundredths.toFixed(1) : Math.round(hundredths)} %`;
}

/** So many per unit: 0.4, 1, 11.2. */
export function each(total, units) {
  if (!units) return NONE;
  const mean = total / units;
  return Number.isInteger(mean) || mean >= 99.5 ? count(mean) : mean.toFixed(1);
}

export function clock(at) {
  return CLOCK.format(at * 1000);
}

export function plural(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}
