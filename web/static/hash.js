// SHA-256 of bytes that arrive in parts. crypto.subtle needs them all at once, and pages over plain HTTP do not have it.
// The library is a script for every module system; in a module it leaves its functions in globalThis.
import "./vendor/sha256.umd.mjs";

// Returns a hash: init() empties it, update(Uint8Array) adds bytes, digest() returns hexadecimal digits.
export function sha256() {
  return globalThis.hashwasm.createSHA256();
}
