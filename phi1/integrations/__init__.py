"""Our operations inside other libraries' models; nothing of ours imports this room."""
