// Sizes, times and ages for people; the same words as on the command line.

const PREFIXES = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
const FACTORS = { "": 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40, P: 2 ** 50 };
export const MIB = 2 ** 20;

export function size(bytes) {
  if (bytes === null || bytes === undefined) return "not known";
  const sign = bytes < 0 ? "-" : "";
  let value = Math.abs(bytes);
  if (value < 1024) return `${sign}${Math.round(value)} B`;
  let prefix = "";
  for (prefix of PREFIXES) {
    value /= 1024;
    if (value < 999.5) break;
  }
  return `${sign}${value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0)} ${prefix}B`;
}

// Bytes meant by `20G`, `1.5GiB` or plain bytes; null for anything else.
export function parse(text) {
  const match = /^\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?\s*$/i.exec(text);
  if (!match) return null;
  const bytes = Math.floor(Number(match[1]) * FACTORS[match[2].toUpperCase()]);
  return Number.isSafeInteger(bytes) && bytes > 0 ? Math.floor(bytes / 4096) * 4096 : null;
}

export function duration(seconds) {
  if (seconds < 1) return "less than a second";
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400 * 2) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} days`;
}

export function clock(seconds) {
  const then = new Date(seconds * 1000);
  const time = then.toLocaleTimeString([], { hour12: false });
  return then.toDateString() === new Date().toDateString() ? time : `${then.toLocaleDateString()} ${time}`;
}
