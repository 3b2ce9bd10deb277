"""Rules that a configuration keeps, by section, as `engine.config.schema` has them: called by `resolve`."""
