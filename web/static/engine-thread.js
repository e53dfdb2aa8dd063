// A thread of the engine, with its own instance of the module and its own stack in the common memory.
self.onmessage = async ({ data: { module, memory, model, thread, stack } }) => {
  let exports;
  try {
    ({ exports } = await WebAssembly.instantiate(module, { env: { memory } }));
  } catch (error) {
    self.postMessage({ problem: String(error) });
    return;
  }
  exports.__stack_pointer.value = stack;
  self.postMessage({ ready: true });
  exports.join(model, thread); // does not return before the worker is terminated
};
