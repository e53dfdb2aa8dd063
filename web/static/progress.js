// What the page says about a download: bytes, speed, the time that is left, and whether the browser has room for the files.

// Seconds over which the speed is averaged.
const SECONDS = 5;

export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

export class Progress {
  #seen = []; // [seconds, bytes from the network]

  // Returns a line about what fetchAll() has reported. milliseconds: the time of the report.
  line({ waiting, loaded, total, fetched = 0 }, milliseconds) {
    if (waiting) return "Waiting: another tab is loading the model";
    const now = milliseconds / 1e3;
    this.#seen.push([now, fetched]);
    while (this.#seen.length > 2 && this.#seen[1][0] <= now - SECONDS) this.#seen.shift();
    const [[since, before]] = this.#seen;
    const parts = [`Loading: ${megabytes(loaded)} of ${megabytes(total)}`];
    const speed = (fetched - before) / (now - since);
    if (speed > 0 && now - since >= 0.5) {
      parts.push(`${megabytes(speed)}/s`);
      if (loaded < total) parts.push(`${duration((total - loaded) / speed)} left`);
    }
    return parts.join(" · ");
  }
}

export const FULL = "The browser's storage is full: the model will work but not be stored.";

// Returns a sentence about files that the browser will not store, or "". granted: bytes that it grants, null if it has no store.
// Chromium claims to grant 10 GB whatever there is, and says the truth only when something is stored.
export function storageNote({ bytes, stored, granted }) {
  const missing = bytes - stored;
  if (granted === null || granted >= missing) return "";
  return `The browser grants ${megabytes(granted)} and the model needs ${megabytes(missing)}: it will work but not be stored.`;
}

function duration(seconds) {
  if (seconds < 100) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 6000 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}
