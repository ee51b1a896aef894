"""Files and folders: read with plain errors, written whole or not at all, removed only where they are ours."""
