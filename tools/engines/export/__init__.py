"""Writers of folders and files for engines that read neither checkpoints nor Hugging Face folders."""
