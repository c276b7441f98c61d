"""Pure tensor functions: tensor in, tensor out; no modules, files, logs, devices, flags or clocks."""
