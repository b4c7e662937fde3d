"""What scores say about images, for people to read: profiles against a reference, and a page about many images."""
