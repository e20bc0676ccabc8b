"""ChatGenBench: freestyle chats for demonstrations of text-to-image models (ChatGen Sec. 3.1)."""
