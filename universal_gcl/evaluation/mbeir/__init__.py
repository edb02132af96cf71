"""M-BEIR: 16 tasks with local pools and the global one."""
