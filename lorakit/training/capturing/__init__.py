"""What a capture is made of: a program and its signals; its output folder, where what is finished is held and kept."""
