"""Methods compared on photos and on drawn scenes."""
