"""`validation.prompts: library`."""

LIBRARY = (
    "a red fox trots through deep snow between dark pines, breath visible in the cold air, low sun from the side",
    "close-up of an old fisherman with a grey beard, mending a net on a wooden pier, wind in his hair, overcast light",
    "a yellow tram climbs a steep narrow street between tiled houses, people step aside, the camera follows it",
    "slow motion of a glass of water tipping over on a kitchen table, the water spreads and drips from the edge",
    "aerial view of waves breaking on black volcanic sand, white foam drawing patterns, the camera glides forward",
    "a woman in a blue raincoat dances alone in an empty car park at night, neon signs reflected in the puddles",
    "a paper boat drifts down a small stream through a mossy forest, passing under a fallen branch, macro shot",
    "a tabby kitten jumps at a feather on a string in a sunlit living room, misses it and rolls over on the carpet",
    "two chefs toss vegetables in a flaming wok in a crowded street kitchen, steam and sparks, handheld camera",
    "a steam locomotive crosses a stone viaduct in autumn, smoke trailing behind it, wide shot from the valley",
    "watercolour animation of a hot-air balloon rising over green hills, brush strokes moving in the sky",
    "an astronaut walks across red dunes towards a small greenhouse with glowing windows, dust blowing past",
)
"""For validation: motion of animals, people, water, fire and the camera, in several styles."""
