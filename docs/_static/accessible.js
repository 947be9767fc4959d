// What the theme leaves out: regions that scroll can be reached by keyboard, and captions have a heading level.
addEventListener("DOMContentLoaded", () => {
  for (const region of document.querySelectorAll(".highlight pre, .table-wrapper")) region.tabIndex = 0;
  for (const caption of document.querySelectorAll(".caption[role=heading]")) caption.ariaLevel = 2;
});
