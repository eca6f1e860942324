"""wan-tiny's world: synthetic captioned clips, and a scorer that checks videos against their captions by looking."""
