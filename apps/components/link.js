// Copies the address of the page. Where the browser forbids it, the address is shown to be copied by hand.

const SHOWN_MS = 4000;

// The navigation above puts a layer between its list and the items, so that a screen reader finds a list without items
// and items without a list. It is drawn whenever it likes: watched, not asked.
function mendNavigation() {
  for (const list of document.querySelectorAll("ul[data-testid=stSidebarNavItems]")) {
    if (list.getAttribute("role") !== "none") list.setAttribute("role", "none");
    for (const item of list.querySelectorAll("li")) {
      if (item.parentElement !== list && item.parentElement.getAttribute("role") !== "list") {
        item.parentElement.setAttribute("role", "list");
      }
    }
  }
}

// A view of a model is passed on without the figures that were put aside meanwhile; the page that shows them is not.
function linked({ href }) {
  const address = new URL(href);
  if (address.pathname.endsWith("/report")) return href;
  address.searchParams.delete("report");
  return address.href;
}

export default function ({ parentElement }) {
  const button = parentElement.querySelector(".copy");
  const said = parentElement.querySelector(".said");
  let timer;
  const watcher = new MutationObserver(mendNavigation);
  watcher.observe(document.body, { childList: true, subtree: true });
  mendNavigation();
  button.onclick = async () => {
    const address = linked(window.location);
    clearTimeout(timer);
    try {
      await navigator.clipboard.writeText(address);
      said.textContent = "Link copied.";
      timer = setTimeout(() => (said.textContent = ""), SHOWN_MS);
    } catch {
      said.textContent = address;
    }
  };
  return () => {
    clearTimeout(timer);
    watcher.disconnect();
  };
}
