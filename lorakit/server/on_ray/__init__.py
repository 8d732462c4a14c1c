"""The server on Ray Serve: one gateway, and engines that Ray starts, replaces and adds as they are asked."""
