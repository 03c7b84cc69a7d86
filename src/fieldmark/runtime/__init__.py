"""What the process runs on: cores, instruction set, log and progress, files written safely."""
