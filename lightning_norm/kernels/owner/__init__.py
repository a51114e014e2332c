"""One launch per direction for small maps, where nothing looks across channels: bn, in, rbn, ubn, dbn, cn."""
