"""WebVid-CoVR: composed video retrieval."""
