"""Find image files, decode them, and convert them to RGB.

Scores depend on the conversion, so there is one for every source:

- 8-bit RGB is unchanged: the pixels of pyiqa's `imread2tensor`, divided by 255.
- EXIF orientation is applied, so that a photograph is scored as viewers show it. pyiqa does not apply it, and published
  figures were made without it: `ignore_orientation=True` keeps the stored orientation.
- Colours are converted from an embedded ICC profile to sRGB (relative colorimetric, black point compensation), unless
  the profile is sRGB: if it changes no colour by more than 2 of 255, pixels are unchanged. Grey stays grey and, with 16
  bits, keeps its steps. As in viewers, a profile that is damaged or made for other channels is ignored. pyiqa ignores
  all profiles, as does `ignore_profile=True`. `gAMA` and `cHRM` of a PNG are not profiles.
- Grey becomes three equal channels. Palettes are looked up. Of several frames or pages, the current (first) one counts.
- Alpha and transparent colours of palettes and PNGs are composited over white, in floating point.
- 16-bit grey is divided by 65535, 12-bit grey by 4095. TIFFs that store white as 0 are inverted. Pillow decodes
  deeper colour to 8 bits; pass such pixels as a uint16 array. PIL's mode I, which some formats use for 16 bits, counts
  as 16 bits. Signed and 32-bit integers of a TIFF have no defined white and are refused.
- CMYK, YCbCr and Lab are converted by the embedded profile, or by Pillow if there is none.
- Nothing is resized. Files and PIL images of more than `max_pixels` are refused before decoding.
- Truncated data are an error, even where `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set. `allow_truncated=True` accepts
  them where Pillow can decode a part (JPEG, PNG, GIF, BMP and other formats read row by row); the decoder fills the
  rest: with grey or the last colour in a JPEG, with black in a PNG.

Scores do not depend on Pillow's global state, and it is not changed, with one exception: while an image is being read,
`LOAD_TRUNCATED_IMAGES` is off in the whole process.
"""
