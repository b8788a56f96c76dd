"""What the tests share: running the program, making disks, judging images."""
