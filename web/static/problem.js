// What went wrong, in one line, and what to do about it.
export class Problem extends Error {
  constructor(message, hint = "") {
    super(message);
    this.hint = hint;
  }
}

export function asProblem(error) {
  if (error instanceof Problem) return error;
  return new Problem(String(error?.message ?? error).split("\n")[0], "reload the page; if that does not help, please report it");
}
