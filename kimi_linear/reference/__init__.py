"""The specification: each recurrence beside its equation, and a readable chunked form."""
