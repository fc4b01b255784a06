"""Components that run in the browser: one ES module each, without build step and without network."""
