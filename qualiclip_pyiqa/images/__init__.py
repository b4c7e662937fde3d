"""Images in: find files, decode them and convert them to RGB. One conversion for every source; it decides scores.

- 8-bit RGB is taken as it is: the pixels of pyiqa's `imread2tensor`, divided by 255.
- EXIF orientation is applied, so that a photograph is scored as a viewer shows it. pyiqa does not apply it, and
  published figures were made without it: `ignore_orientation=True` takes the pixels as they are stored.
- An embedded ICC profile is converted to sRGB, relative colorimetric with black point compensation, unless it is sRGB
  itself: one that changes no colour by more than 2 of 255 leaves the pixels untouched. Grey keeps three equal channels
  and, with 16 bits, its steps. A profile that is damaged or made for other channels is ignored, as viewers do.
  pyiqa ignores all profiles: so does `ignore_profile=True`. `gAMA` and `cHRM` of a PNG are not profiles.
- Grey becomes three equal channels; palettes are looked up; of several frames or pages the current (first) one counts.
- Alpha is laid over white, in floating point; so is the transparent colour of a palette or a PNG.
- 16-bit grey is divided by 65535, 12-bit grey by 4095; TIFF that stores white as 0 is inverted. Pillow decodes
  colour of more than 8 bits as 8 bits; pass such pixels as a uint16 array. PIL's mode I, which some formats use for 16
  bits, is taken as 16 bits. Signed integers and 32-bit integers of a TIFF have no defined white and are refused.
- CMYK, YCbCr and Lab become RGB through the embedded profile, or without one through Pillow's conversion.
- Nothing is resized. Files and PIL images of more than `max_pixels` are refused before they are decoded.
- Data that end early are an error, even where `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set. `allow_truncated=True`
  accepts them where Pillow can decode a part (JPEG, PNG, GIF, BMP and others that are read row by row); the rest keeps
  the value that the decoder gives it: grey or the last colour in a JPEG, black in a PNG.

Nothing of Pillow's global state decides a score, and none is changed, but for one flag: while an image is being read,
`LOAD_TRUNCATED_IMAGES` is off in the whole process if it was on.
"""
