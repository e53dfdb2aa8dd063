// What every decoder has: the tokens that it has read, and the state after the last prompt to resume from.

// Tokens per prefill step. A prefill can be stopped between steps, and the size of a step limits the memory of activations.
export const PIECE = 128;

// A decoder defines `clear` (empties the caches), `save` (copies the state, and returns whether it could) and `restore` (goes
// back to the copy).
export class Resumable {
  ids = [];
  #kept = null; // the tokens of the saved state

  // Empties the caches.
  reset() {
    this.#kept = null;
    this.ids = [];
    this.clear();
  }

  // Reuses the current state if it is a prefix of the text, or else the saved state; returns the number of tokens reused.
  resume(ids) {
    const begins = (read) => read.length < ids.length && read.every((id, i) => id === ids[i]);
    if (begins(this.ids)) return this.ids.length;
    if (this.#kept && begins(this.#kept)) {
      this.ids = this.#kept;
      this.restore();
    } else this.reset();
    return this.ids.length;
  }

  // Saves the current state to resume from.
  keep() {
    this.#kept = this.save() ? this.ids : null;
  }
}
