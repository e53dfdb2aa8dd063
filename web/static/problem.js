// An error in one line, with a hint on how to fix it.
export class Problem extends Error {
  constructor(message, hint = "") {
    super(message);
    this.hint = hint;
  }
}

// The error of an allocation that failed.
export const noMemory = () =>
  new Problem("there is not enough memory for the model", "close other tabs and apps, or use a smaller model");

export function asProblem(error) {
  if (error instanceof Problem) return error;
  const message = String(error?.message ?? error).split("\n")[0];
  if (/bad_alloc|out of memory|allocat|maximum memory size|invalid (typed )?array (buffer )?length/i.test(message)) {
    return noMemory();
  }
  return new Problem(message, "reload the page; if that does not help, please report it");
}
