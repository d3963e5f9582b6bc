"""Glue for frameworks that build or run models themselves; nothing here is imported unless asked for."""
